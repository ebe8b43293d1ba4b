"""The weighting network g_φ."""

from typing import Literal

from basicsr.utils.registry import ARCH_REGISTRY
from torch import Generator, Tensor, cat, compiler, nn

from tlw_basicsr.functional import at_least_fp32, fixed_sum, sample_weights


class FixedSum(nn.Module):
    """:func:`tlw_basicsr.fixed_sum` as a module. ``k`` may be set at any time.

    Args:
        k: the mean of every channel of the result, in (0, 1).
    """

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = k

    @compiler.disable  # k changes while training: compiled in, each value would be compiled anew
    def forward(self, x: Tensor) -> Tensor:
        """Weights in [0, 1], (N, C, H, W), to weights of mean ``k`` in the same shape, float32."""
        return fixed_sum(x, self.k)

    def extra_repr(self) -> str:
        """``k``, for ``print(net)``."""
        return f"k={self.k}"


@ARCH_REGISTRY.register()
class TLWWeightNet(nn.Module):
    """Weighting network of Trainable Loss Weights: w = FixedSum_k(sigmoid(CNN(concat(x, x̂)))).

    conv 7×7 - BN - ReLU - conv 5×5 - BN - ReLU - conv 3×3 - BN - ReLU - conv 3×3 - sigmoid - FixedSum(k), same
    padding. Its parameters have the published names (``conv.0`` … ``conv.9``). Images come in BasicSR's [0, 1] and
    are mapped to [-1, 1] here. Source: arXiv:2301.10575.

    Args:
        num_in_ch: channels C of one image.
        num_feat: channels of the hidden layers.
        k: mean of the weights of every channel, in (0, 1); a training sets it by its schedule.
        init: start values: ``'default'`` are torch's, ``'paper'`` those of the published runs (conv weights and
            BN weights N(0, 0.02), BN biases N(0.02, 1), conv biases torch's).
    """

    def __init__(
        self, num_in_ch: int = 3, num_feat: int = 64, k: float = 0.3, init: Literal["default", "paper"] = "default"
    ) -> None:
        super().__init__()
        if init not in ("default", "paper"):
            raise ValueError(f"init must be 'default' or 'paper', got {init!r}")
        layers: list[nn.Module] = []
        for in_ch, kernel in ((2 * num_in_ch, 7), (num_feat, 5), (num_feat, 3)):
            layers += [
                nn.Conv2d(in_ch, num_feat, kernel, padding=kernel // 2),
                nn.BatchNorm2d(num_feat),
                nn.ReLU(inplace=True),
            ]
        self.conv = nn.Sequential(*layers, nn.Conv2d(num_feat, num_in_ch, 3, padding=1))
        self.fixed_sum = FixedSum(k)
        if init == "paper":
            self.apply(paper_start_values)

    @property
    def k(self) -> float:
        """Mean of the weights, in (0, 1)."""
        return self.fixed_sum.k

    @k.setter
    def k(self, value: float) -> None:
        self.fixed_sum.k = value

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        """Weights w in [0, 1] of mean k for x̂ = ``sr`` and x = ``gt`` in [0, 1]: (N, C, H, W), float32."""
        logits = self.conv(2 * cat([gt, sr], dim=1) - 1)
        return self.fixed_sum(at_least_fp32(logits).sigmoid())

    def sample(self, sr: Tensor, gt: Tensor, num_samples: int = 1) -> Tensor:
        """``num_samples`` relaxed Bernoulli samples of the weights: (S, N, C, H, W), float32."""
        return sample_weights(self(sr, gt), num_samples)


def paper_start_values(module: nn.Module, generator: Generator | None = None) -> None:
    """Start values of the published runs for one module: conv and BN weights N(0, 0.02), BN biases N(0.02, 1)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02, generator)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 0.0, 0.02, generator)
        nn.init.normal_(module.bias, 0.02, 1.0, generator)
