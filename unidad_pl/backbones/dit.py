"""DiT (Peebles and Xie 2023): class-conditional, of VAE latents."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from unidad_pl.backbones.transformer import TransformerNetwork
from unidad_pl.condition import Condition


class DiTNetwork(TransformerNetwork):
    """A ``DiTTransformer2DModel``. The channels of a learned variance are dropped.

    >>> DiTNetwork.output_layer
    'proj_out_2'
    """

    diffusers_class, output_layer = "DiTTransformer2DModel", "proj_out_2"
    pipeline, takes_prompts = "DiTPipeline", False
    older = ("Transformer2DModel",)

    def __init__(self, transformer: nn.Module, *args: Any, **kwargs: Any) -> None:
        from diffusers.models.embeddings import LabelEmbedding

        super().__init__(transformer, *args, **kwargs)
        self.num_classes = self.transformer.config["num_embeds_ada_norm"]
        for layer in transformer.modules():
            if isinstance(layer, LabelEmbedding):
                layer.dropout_prob = 0.0  # each block would forget the label on its own

    @property
    def apart(self) -> list[nn.Module]:
        """The output layers use the first block's embedding of time and class too."""
        return [self.transformer.transformer_blocks[0].norm1.emb]

    def _call(self, scaled: Tensor, time: Tensor, cond: Condition) -> Tensor:
        output = self.transformer(scaled, timestep=time, class_labels=cond.labels).sample
        return output[:, : scaled.shape[1]]
