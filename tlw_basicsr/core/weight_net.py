"""The weighting network g_φ."""

from typing import Annotated, Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from tlw_basicsr.core.arguments import checked, whole
from tlw_basicsr.core.functional import at_least_fp32, fixed_sum, relative_error

PRIOR_FLOOR = 0.003  # keeps the logit of the smallest and the largest error finite


class TLWWeightNet(nn.Module):
    """Weighting network of Trainable Loss Weights: w = FixedSum_k(z), z = sigmoid(CNN(concat(x, x̂))).

    CNN: conv 7×7 - BN - ReLU - conv 5×5 - BN - ReLU - conv 3×3 - BN - ReLU - conv 3×3, same padding. Its parameters
    have the published names (``conv.0`` … ``conv.9``). Images are in [0, 1] and are mapped to [-1, 1] here.
    Source: arXiv:2301.10575.

    Args:
        num_in_ch: channels C of one image.
        num_feat: channels of the hidden layers.
        init: start values: ``'default'`` are torch's, ``'paper'`` those of the published runs (conv weights and
            BN weights N(0, 0.02), BN biases N(0.02, 1), conv biases torch's).
        prior: ``'error'`` starts from the weights in proportion to the error and learns what they lack:
            z = sigmoid(logit(|x̂ - x| / max_{h,w} |x̂ - x|) + CNN), with the last convolution from zero. Not the paper's.
        downscale: the CNN sees means of squares of so many pixels a side, and its logits are interpolated (bilinear).
            2 takes three quarters off its work. Not the paper's.

    Raises:
        ValueError: an argument is not what is accepted.
    """

    @checked
    def __init__(
        self,
        num_in_ch: int = 3,
        num_feat: int = 64,
        init: Literal["default", "paper"] = "default",
        prior: Literal["none", "error"] = "none",
        downscale: Annotated[int, whole(1)] = 1,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for in_ch, kernel in ((2 * num_in_ch, 7), (num_feat, 5), (num_feat, 3)):
            layers += [
                nn.Conv2d(in_ch, num_feat, kernel, padding=kernel // 2),
                nn.BatchNorm2d(num_feat),
                nn.ReLU(inplace=True),
            ]
        last = nn.Conv2d(num_feat, num_in_ch, 3, padding=1)
        self.conv = nn.Sequential(*layers, last)
        self.prior, self.num_in_ch, self.downscale = prior, num_in_ch, downscale
        if init == "paper":
            self.apply(paper_start_values)
        if prior == "error":
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """``torch.compile`` of the convolutions alone: FixedSum would be compiled anew for each k."""
        self.conv.compile(*args, **kwargs)

    def probabilities(self, sr: Tensor, gt: Tensor) -> Tensor:
        """z in [0, 1], the weights before FixedSum, of x̂ = ``sr`` and x = ``gt`` in [0, 1]: (N, C, H, W), float32.

        Raises:
            ValueError: C is not ``num_in_ch``.
        """
        if gt.shape[1] != self.num_in_ch:
            raise ValueError(f"TLWWeightNet: num_in_ch is {self.num_in_ch}, the images have {gt.shape[1]} channels")
        images = 2 * torch.cat([gt, sr], dim=1) - 1
        if self.downscale > 1:
            images = F.avg_pool2d(images, self.downscale, ceil_mode=True, count_include_pad=False)
        logits = at_least_fp32(self.conv(images))
        if self.downscale > 1:  # an incomplete square at the border is as large as the others here, then cut
            logits = F.interpolate(logits, scale_factor=self.downscale, mode="bilinear")
            logits = logits[..., : gt.shape[-2], : gt.shape[-1]]
        if self.prior == "error":
            logits = logits + relative_error(sr, gt).clamp(PRIOR_FLOOR, 1 - PRIOR_FLOOR).logit()
        return logits.sigmoid()

    def forward(self, sr: Tensor, gt: Tensor, k: float | Tensor) -> Tensor:
        """Weights w in [0, 1] of mean ``k`` for x̂ = ``sr`` and x = ``gt`` in [0, 1]: (N, C, H, W), float32."""
        return fixed_sum(self.probabilities(sr, gt), k)


def paper_start_values(module: nn.Module, generator: Generator | None = None) -> None:
    """Start values of the published runs for one module: conv and BN weights N(0, 0.02), BN biases N(0.02, 1)."""
    if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
        nn.init.normal_(module.weight, 0.0, 0.02, generator)
    if isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.bias, 0.02, 1.0, generator)
