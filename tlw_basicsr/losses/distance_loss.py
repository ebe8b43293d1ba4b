"""Registers the distances of the core with BasicSR: ``distance: {type: LPIPSDistance, …}``."""

from typing import Any

from basicsr.utils.registry import LOSS_REGISTRY
from torch import nn

from tlw_basicsr.core.distances import LPIPSDistance, MissingWeights, SSIMDistance
from tlw_basicsr.util.errors import UserError

LOSS_REGISTRY.register(LPIPSDistance)
LOSS_REGISTRY.register(SSIMDistance)


def build_distance(options: dict[str, Any]) -> nn.Module:
    """The registered distance of ``{type: …, …}``.

    Raises:
        UserError: ``type`` is missing, the distance refuses an option, or its weights could not be loaded.
    """
    options, place = dict(options), "train.pixel_opt.distance"
    if "type" not in options:
        raise UserError(f"{place}.type: missing; accepted is a registered loss, such as SSIMDistance")
    try:
        return LOSS_REGISTRY.get(options.pop("type"))(**options)
    except MissingWeights as error:
        raise UserError(f"{place}: {error.in_options()}") from error
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error
