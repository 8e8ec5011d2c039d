"""Networks behind the denoiser contract."""

from unidad_pl.backbones.adm import ADMSource, ADMStateDictAdapter
from unidad_pl.backbones.adm_config import ADMConfig
from unidad_pl.backbones.lora import LoRA
from unidad_pl.backbones.spec import UNetSpec
from unidad_pl.backbones.stable_diffusion import StableDiffusion, StableDiffusionUNet
from unidad_pl.backbones.unet import NewUNet, PretrainedUNet, UNetDenoiser

__all__ = [
    "ADMConfig", "ADMSource", "ADMStateDictAdapter", "LoRA", "NewUNet", "PretrainedUNet", "StableDiffusion",
    "StableDiffusionUNet", "UNetDenoiser", "UNetSpec",
]  # fmt: skip
