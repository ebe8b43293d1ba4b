"""Trainable Loss Weights (TLW, arXiv:2301.10575) for super-resolution, as a BasicSR plugin.

Importing the package registers its networks, losses, data sets and models with BasicSR.
"""

from importlib.util import find_spec

if find_spec("basicsr") is None:
    raise ImportError("BasicSR is not installed in this environment; run: tlw-setup")

from tlw_basicsr import compat  # noqa: I001  mends basicsr's imports, so it comes first

from tlw_basicsr.archs.sr_archs import TLWHAT, TLWRCAN, TLWVDSR, UncertaintyHead
from tlw_basicsr.archs.tlw_weight_net_arch import TLWWeightNet
from tlw_basicsr.data.bicubic import imresize
from tlw_basicsr.data.bicubic_sr_dataset import BicubicSRDataset
from tlw_basicsr.util.errors import UserError
from tlw_basicsr.core.functional import (
    DistanceTo,
    error_weights,
    fixed_sum,
    k_schedule,
    marginal_pixel_loss,
    relaxed_bernoulli,
    sample_weights,
    uncertainty_driven_loss,
    uncertainty_loss,
    weight_criterion_loss,
    weighted_pixel_loss,
)
from tlw_basicsr.losses.distance_loss import FeatureDistance, LPIPSDistance, SSIMDistance
from tlw_basicsr.losses.tlw_loss import TLWLoss
from tlw_basicsr.losses.uncertainty_loss import UncertaintyLoss
from tlw_basicsr.metrics import paper_metrics  # noqa: F401  registers the metrics
from tlw_basicsr.models.tlw_model import TLWMixin, TLWModel, with_tlw
from tlw_basicsr.models.uncertainty_model import UncertaintyModel
from tlw_basicsr.core.tlw import TLW
from tlw_basicsr.version import __version__

compat.replace_functions()

__all__ = [
    "TLW",
    "TLWHAT",
    "TLWRCAN",
    "TLWVDSR",
    "BicubicSRDataset",
    "DistanceTo",
    "FeatureDistance",
    "LPIPSDistance",
    "SSIMDistance",
    "TLWLoss",
    "TLWMixin",
    "TLWModel",
    "TLWWeightNet",
    "UncertaintyHead",
    "UncertaintyLoss",
    "UncertaintyModel",
    "UserError",
    "__version__",
    "compat",
    "error_weights",
    "fixed_sum",
    "imresize",
    "k_schedule",
    "marginal_pixel_loss",
    "relaxed_bernoulli",
    "sample_weights",
    "uncertainty_driven_loss",
    "uncertainty_loss",
    "weight_criterion_loss",
    "weighted_pixel_loss",
    "with_tlw",
]
