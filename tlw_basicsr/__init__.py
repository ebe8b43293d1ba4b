"""Trainable Loss Weights (TLW, arXiv:2301.10575) for super-resolution: for any training loop, and as a BasicSR plugin.

The names below are imported when they are first used; those of ``core`` need torch alone. Networks, losses, data sets
and models are registered with BasicSR when BasicSR is imported, see :mod:`tlw_basicsr.plugin`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tlw_basicsr import plugin
from tlw_basicsr.version import __version__ as __version__

if TYPE_CHECKING:  # the names of PLACES, for editors and type checkers
    from tlw_basicsr.archs.sr_archs import TLWHAT as TLWHAT
    from tlw_basicsr.archs.sr_archs import TLWRCAN as TLWRCAN
    from tlw_basicsr.archs.sr_archs import TLWVDSR as TLWVDSR
    from tlw_basicsr.archs.sr_archs import UncertaintyHead as UncertaintyHead
    from tlw_basicsr.core.distances import FeatureDistance as FeatureDistance
    from tlw_basicsr.core.distances import LPIPSDistance as LPIPSDistance
    from tlw_basicsr.core.distances import SSIMDistance as SSIMDistance
    from tlw_basicsr.core.functional import DistanceTo as DistanceTo
    from tlw_basicsr.core.functional import error_weights as error_weights
    from tlw_basicsr.core.functional import fixed_sum as fixed_sum
    from tlw_basicsr.core.functional import k_schedule as k_schedule
    from tlw_basicsr.core.functional import marginal_pixel_loss as marginal_pixel_loss
    from tlw_basicsr.core.functional import relaxed_bernoulli as relaxed_bernoulli
    from tlw_basicsr.core.functional import sample_weights as sample_weights
    from tlw_basicsr.core.functional import uncertainty_driven_loss as uncertainty_driven_loss
    from tlw_basicsr.core.functional import uncertainty_loss as uncertainty_loss
    from tlw_basicsr.core.functional import weight_criterion_loss as weight_criterion_loss
    from tlw_basicsr.core.functional import weighted_pixel_loss as weighted_pixel_loss
    from tlw_basicsr.core.pixel_loss import TLWPixelLoss as TLWPixelLoss
    from tlw_basicsr.core.tlw import TLW as TLW
    from tlw_basicsr.core.weight_net import TLWWeightNet as TLWWeightNet
    from tlw_basicsr.core.weightings import LDLWeights as LDLWeights
    from tlw_basicsr.core.weightings import LearnedWeights as LearnedWeights
    from tlw_basicsr.core.weightings import PSPLWeights as PSPLWeights
    from tlw_basicsr.core.weightings import Weighting as Weighting
    from tlw_basicsr.data.bicubic import imresize as imresize
    from tlw_basicsr.data.bicubic_sr_dataset import BicubicSRDataset as BicubicSRDataset
    from tlw_basicsr.losses.tlw_loss import TLWLoss as TLWLoss
    from tlw_basicsr.losses.uncertainty_loss import UncertaintyLoss as UncertaintyLoss
    from tlw_basicsr.models.tlw_model import TLWMixin as TLWMixin
    from tlw_basicsr.models.tlw_model import TLWModel as TLWModel
    from tlw_basicsr.models.tlw_model import with_tlw as with_tlw
    from tlw_basicsr.models.uncertainty_model import UncertaintyModel as UncertaintyModel
    from tlw_basicsr.util.errors import UserError as UserError

PLACES = {
    "archs.sr_archs": "TLWHAT TLWRCAN TLWVDSR UncertaintyHead",
    "core.distances": "FeatureDistance LPIPSDistance SSIMDistance",
    "core.functional": (
        "DistanceTo error_weights fixed_sum k_schedule marginal_pixel_loss relaxed_bernoulli "
        "sample_weights uncertainty_driven_loss uncertainty_loss weight_criterion_loss weighted_pixel_loss"
    ),
    "core.pixel_loss": "TLWPixelLoss",
    "core.tlw": "TLW",
    "core.weight_net": "TLWWeightNet",
    "core.weightings": "LDLWeights LearnedWeights PSPLWeights Weighting",
    "data.bicubic": "imresize",
    "data.bicubic_sr_dataset": "BicubicSRDataset",
    "losses.tlw_loss": "TLWLoss",
    "losses.uncertainty_loss": "UncertaintyLoss",
    "models.tlw_model": "TLWMixin TLWModel with_tlw",
    "models.uncertainty_model": "UncertaintyModel",
    "util.errors": "UserError",
}
_MODULES = {name: f"{__name__}.{place}" for place, names in PLACES.items() for name in names.split()}
if not TYPE_CHECKING:
    __all__ = [*sorted(_MODULES), "__version__", "compat"]

    def __getattr__(name: str) -> Any:
        """Import a name when it is first used (PEP 562)."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


plugin.install()
