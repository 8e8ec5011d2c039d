"""Metrics of generated images, as ``torchmetrics.Metric`` classes and pure functions; usable without Lightning.

They need nothing of this package but each other. Every one gives the same number on one process and on many, up to the
rounding of float64 in its sums, and of float32 in a network whose kernels depend on processor and threads.
"""

from unidad_pl.metrics.encoders import CLIPImages, CLIPTexts, DINOImages, DINOv2Images
from unidad_pl.metrics.features import FeatureModule, InceptionFeatures, LPIPSFeatures
from unidad_pl.metrics.frechet import Frechet, Gaussian, frechet_distance, read_statistics
from unidad_pl.metrics.intra_lpips import IntraClusterLPIPS, IntraClusterResult
from unidad_pl.metrics.kernel import KID, GaussianMMD, gaussian_mmd, kid
from unidad_pl.metrics.prdc import PRDC
from unidad_pl.metrics.similarity import PromptLPIPS, SubjectCosines
from unidad_pl.metrics.two_sample import TwoSample
from unidad_pl.metrics.wasserstein import sliced_wasserstein, wasserstein

__all__ = [
    "KID", "PRDC", "CLIPImages", "CLIPTexts", "DINOImages", "DINOv2Images", "FeatureModule", "Frechet", "Gaussian",
    "GaussianMMD", "InceptionFeatures", "IntraClusterLPIPS", "IntraClusterResult", "LPIPSFeatures", "PromptLPIPS",
    "SubjectCosines", "TwoSample", "frechet_distance", "gaussian_mmd", "kid", "read_statistics", "sliced_wasserstein",
    "wasserstein",
]  # fmt: skip
