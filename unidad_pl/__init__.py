"""Uni-DAD in PyTorch Lightning: few-step, few-shot image generation (arXiv 2511.18281)."""
