"""Networks behind the denoiser contract."""

from unidad_pl.backbones.unet import NewUNet, PretrainedUNet, UNetDenoiser, UNetSpec

__all__ = ["NewUNet", "PretrainedUNet", "UNetDenoiser", "UNetSpec"]
