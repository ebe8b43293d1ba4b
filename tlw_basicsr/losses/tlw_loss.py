"""The pixel loss with trainable weights, as a YAML names it."""

from typing import Any, Literal, cast

from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from tlw_basicsr.core.tlw import TLW, Base, LossWeight, NumSamples, Stochastic, Weights
from tlw_basicsr.util.errors import UserError, short

PAPER_DISTANCE = {"type": "LPIPSDistance", "net": "vgg"}  # the D of arXiv:2301.10575


@LOSS_REGISTRY.register()
class TLWLoss(nn.Module):
    """``train.pixel_opt`` of a :class:`tlw_basicsr.TLWModel`: the options of :class:`tlw_basicsr.TLW` that stand there.

    It is no loss by itself: the model gives it the weighting network, see :meth:`make_tlw`. In a loop of one's own,
    :class:`tlw_basicsr.TLW` is the loss.

    Args:
        distance: options of D, ``{type: a registered loss that gives one value per sample, …}``, or such a module. None
            for the paper's, ``{type: LPIPSDistance, net: vgg}``. The controls have none.
        base, weights, stochastic, num_samples, loss_weight: as in :class:`tlw_basicsr.TLW`.
        reduction: BasicSR's; only the mean.
    """

    def __init__(
        self,
        distance: dict[str, Any] | nn.Module | None = None,
        base: Base = "l1",
        stochastic: Stochastic = True,
        num_samples: NumSamples = 3,
        loss_weight: LossWeight = 1.0,
        reduction: Literal["mean"] = "mean",
        weights: Weights = "learned",
    ) -> None:
        super().__init__()
        if reduction != "mean":
            raise UserError(f"TLWLoss: reduction must be mean, got {short(reduction)}")
        if not isinstance(distance, dict | nn.Module | None):
            raise UserError(
                f"TLWLoss: distance must be options such as {{type: LPIPSDistance, net: vgg}}, or a module, "
                f"got {short(distance)}"
            )
        if weights != "learned" and distance is not None:
            raise UserError(f"TLWLoss: distance is not used with weights: {weights}; delete it")
        if weights == "learned" and not isinstance(distance, nn.Module):
            options = dict(PAPER_DISTANCE if distance is None else distance)
            if "type" not in options:
                raise UserError("TLWLoss: distance.type: missing; accepted is a registered loss, as SSIMDistance")
            distance = LOSS_REGISTRY.get(options.pop("type"))(**options)
        self.distance = cast("nn.Module | None", distance)
        self.arguments = {
            "base": base,
            "weights": weights,
            "stochastic": stochastic,
            "num_samples": num_samples,
            "loss_weight": loss_weight,
        }
        if weights != "learned":
            self.make_tlw()  # raises where they don't go together

    def make_tlw(self, **more: Any) -> TLW:
        """The object of these options and ``more`` arguments of :class:`tlw_basicsr.TLW`.

        Raises:
            UserError: they are wrong, or don't go together.
        """
        try:
            return TLW(self.distance, **self.arguments, **more)
        except ValueError as error:
            raise UserError(f"train.pixel_opt or train.tlw: {error}") from error

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        """Not without a weighting network."""
        raise UserError("TLWLoss needs model_type: TLWModel, which has the weighting network; in Python use TLW")
