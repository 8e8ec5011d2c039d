"""Networks behind the denoiser contract."""

from unidad_pl.backbones.adm import ADMSource, ADMStateDictAdapter
from unidad_pl.backbones.adm_config import ADMConfig
from unidad_pl.backbones.lora import LoRA
from unidad_pl.backbones.sources import Transformer
from unidad_pl.backbones.spec import UNetSpec
from unidad_pl.backbones.stable_diffusion import StableDiffusion, StableDiffusionUNet
from unidad_pl.backbones.transformer import TransformerNetwork
from unidad_pl.backbones.unet import NewUNet, PretrainedUNet, UNetDenoiser

__all__ = [
    "ADMConfig", "ADMSource", "ADMStateDictAdapter", "LoRA", "NewUNet", "PretrainedUNet", "StableDiffusion",
    "StableDiffusionUNet", "Transformer", "TransformerNetwork", "UNetDenoiser", "UNetSpec",
]  # fmt: skip
