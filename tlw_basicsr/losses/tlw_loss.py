"""The pixel loss with trainable weights, as a YAML names it."""

from typing import Any, Literal, cast

from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from tlw_basicsr.core.tlw import TLW, Base, LossWeight, NumSamples, Stochastic, Weights
from tlw_basicsr.losses.distance_loss import build_distance
from tlw_basicsr.util.errors import UserError, short

PAPERS_DISTANCE = {"type": "LPIPSDistance", "net": "vgg"}


@LOSS_REGISTRY.register()
class TLWLoss(nn.Module):
    """``train.pixel_opt`` of a :class:`tlw_basicsr.TLWModel`: the options of :class:`tlw_basicsr.TLW` that stand there.

    It is not a loss by itself: the model gives it the weighting network, see :meth:`make_tlw`. In a loop of your own,
    :class:`tlw_basicsr.TLW` is the loss.

    Args:
        distance: options of D, ``{type: a registered loss that gives one value per sample, …}``, or such a module. None
            for the paper's, ``{type: LPIPSDistance, net: vgg}``. The controls have none.
        base: ℓ of a pixel; this and the following as in :class:`tlw_basicsr.TLW`.
        stochastic: relaxed Bernoulli samples of the weights; else the map itself.
        num_samples: S, samples in an M step.
        loss_weight: factor of L_θ.
        reduction: BasicSR's; only the mean.
        weights: ``'learned'``, ``'random'`` or ``'error'``.
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
            distance = build_distance(PAPERS_DISTANCE if distance is None else distance)
        self.distance = cast("nn.Module | None", distance)
        self.arguments = {
            "base": base,
            "weights": weights,
            "stochastic": stochastic,
            "num_samples": num_samples,
            "loss_weight": loss_weight,
        }
        if weights != "learned":
            self.make_tlw()  # raises if they do not go together

    def make_tlw(self, **more: Any) -> TLW:
        """Build the object from these options and ``more`` arguments of :class:`tlw_basicsr.TLW`.

        Raises:
            UserError: an option is wrong, or does not go with another.
        """
        try:
            return TLW(self.distance, **self.arguments, **more)
        except ValueError as error:
            raise UserError(f"train.pixel_opt or train.tlw: {error}") from error

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        """Refuse: the loss needs a weighting network."""
        raise UserError("TLWLoss needs model_type: TLWModel, which has the weighting network; in Python use TLW")
