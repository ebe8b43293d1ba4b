"""The two losses of the uncertainty baseline on BasicSR's images."""

from typing import Annotated

from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from tlw_basicsr.core.functional import uncertainty_driven_loss, uncertainty_loss


@LOSS_REGISTRY.register()
class UncertaintyLoss(nn.Module):
    """Pixel loss of :class:`tlw_basicsr.UncertaintyModel`; images are in [0, 1]."""

    def __init__(self, loss_weight: Annotated[float, "factor of the loss"] = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, sr: Tensor, gt: Tensor, s: Tensor, stage: int) -> Tensor:
        """L_ESU in stage 1, L_UDL in stage 2, of x̂, x and the log-variance map s, all (N, C, H, W): scalar."""
        equation = uncertainty_loss if stage == 1 else uncertainty_driven_loss
        return self.loss_weight * equation(sr, gt, s)
