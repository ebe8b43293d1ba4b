"""Weightings, which say how much each pixel counts in the loss of a :class:`tlw_basicsr.TLW`."""

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlw_basicsr.core.arguments import POSITIVE, checked
from tlw_basicsr.core.distances import ODD
from tlw_basicsr.core.functional import (
    EPS_DISTANCE,
    Distance,
    absolute_error,
    at_least_fp32,
    fixed_sum,
    is_at_hand,
    relative,
    sample_weights,
    weight_criterion_loss,
)

SSIM_SIGMA = 1.5  # of the Gaussian window, with C1 and C2 as in SSIM's own paper
C1, C2 = 0.01**2, 0.03**2


class Weighting(nn.Module):
    r"""A weighting of the pixels; a subclass says by :meth:`map` how much each of them counts.

    The map M of x̂ and x is relative: w = FixedSum_k(M / max_{h,w} M), so that the mean of every channel's weights is k
    whatever the weighting is, and two weightings differ only in where they put weight. It gets no gradient. ::

        class MaskWeights(Weighting):
            needs = ("mask",)

            def map(self, sr, gt, t, mask):
                return 0.1 + mask

        tlw = TLW(weights=MaskWeights())
        loss = tlw(net(lq), gt, mask=mask)

    Attributes:
        needs: names of the images that :meth:`map` also gets: ``sr_ema``, the SR image of the network's moving
            average, or any other of the training's batch, such as ``mask``.
        sampled: whether the M step may draw relaxed Bernoulli samples of w (``stochastic``); else it takes w itself.
    """

    needs: tuple[str, ...] = ()
    sampled = False

    def map(self, sr: Tensor, gt: Tensor, t: float, **images: Tensor) -> Tensor:
        """M, at least 0, of any scale: (N, C, H, W), or (N, 1, H, W) for all channels.

        Args:
            sr: x̂ (N, C, H, W), detached; a network's output may be a little outside [0, 1].
            gt: x (N, C, H, W) in [0, 1].
            t: epoch or iteration from 0, as k's schedule counts.
            **images: what ``needs`` names, each (N, C, H, W).
        """
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, sr: Tensor, gt: Tensor, k: float | Tensor, t: float = 0.0, **images: Tensor) -> Tensor:
        """Weights w in [0, 1] of mean ``k``: (N, C, H, W), at least float32; ``k`` everywhere where the map is 0.

        Arguments as :meth:`map`.

        Raises:
            ValueError: the map is of another shape, or, where its values are at hand, below 0.
        """
        found, name = at_least_fp32(self.map(sr, gt, t, **images)), type(self).__name__
        one_channel = (gt.shape[0], 1, *gt.shape[2:])
        if found.shape not in (gt.shape, one_channel):
            raise ValueError(f"{name}: map must be {tuple(gt.shape)} or {one_channel}, got {tuple(found.shape)}")
        if not torch.is_tensor(k) and is_at_hand(found) and found.min() < 0:  # a recorded step must not read values
            raise ValueError(f"{name}: map must be at least 0, got {found.min():.3g}")
        return fixed_sum(relative(found).expand(gt.shape), k)


class LearnedWeights(Weighting):
    """The weights of a network φ, w = g_φ(x, x̂), which an E step trains: Trainable Loss Weights (arXiv:2301.10575).

    Another :meth:`e_loss` makes another method with the same φ, schedule and files.
    """

    sampled = True

    def e_loss(self, distance: Distance, sr: Tensor, gt: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """What an E step minimises over φ: L_φ, :func:`tlw_basicsr.weight_criterion_loss`; scalar.

        ``w`` is g_φ(x, x̂) of mean k, with gradient to φ. ``noise`` (1, N, C, H, W) from U(0, 1) is for one sample of w
        (stochastic variant), None for the map itself.
        """
        eps = 0.0 if noise is None else EPS_DISTANCE
        return weight_criterion_loss(distance, sr, gt, w if noise is None else sample_weights(w, 1, noise)[0], eps)


class RandomWeights(Weighting):
    """A control without learning: the constant map, w = k. Samples of it are random weights."""

    sampled = True

    def forward(self, sr: Tensor, gt: Tensor, k: float | Tensor, t: float = 0.0, **images: Tensor) -> Tensor:
        """``k`` everywhere: (N, C, H, W)."""
        return torch.zeros_like(gt) + k


class ErrorWeights(Weighting):
    """A control without learning: M = |x̂ - x|, weights in proportion to the error."""

    def map(self, sr: Tensor, gt: Tensor, t: float, **images: Tensor) -> Tensor:
        """|x̂ - x|."""
        return absolute_error(sr, gt)


class LDLWeights(Weighting):
    r"""The artifact map of LDL: where the error varies from pixel to pixel and has grown.

    With r = Σ_c |x̂ - x|, and r_EMA the same of the SR image of the network's moving average::

        M = var_{7×7}(r), the variance in a window;  M = 0 where r < r_EMA

    The source multiplies by var(r over the image)^(1/5), one number for an image, which drops out of the relative map
    as any factor does. There the weighted loss is added to a GAN's; here it is the pixel loss. It costs one more
    forward of the SR network. Images must have more than half as many pixels a side as the window.
    Source: Liang, Zeng and Zhang, "Details or Artifacts", CVPR 2022.
    """

    needs = ("sr_ema",)

    @checked
    def __init__(self, window: Annotated[int, ODD, "side of the window in which the error varies"] = 7) -> None:
        super().__init__()
        self.window = window

    def map(self, sr: Tensor, gt: Tensor, t: float, sr_ema: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The local variance of the error, 0 where the moving average is worse: (N, 1, H, W)."""
        r, r_ema = (absolute_error(image, gt).sum(1, keepdim=True) for image in (sr, sr_ema))
        padded = F.pad(r, [self.window // 2] * 4, mode="reflect")
        mean, square = (F.avg_pool2d(values, self.window, 1) for values in (padded, padded.square()))
        return torch.where(r < r_ema, 0.0, (square - mean.square()).clamp_min(0))


class PSPLWeights(Weighting):
    r"""Pixel-level self-paced learning: the pixels of least SSIM first, then more and more of them.

    ::

        M = exp(-((SSIM + 1) / σ)²),  σ = alpha·t + beta

    with SSIM the map of each channel, 11×11 Gaussian window of σ = 1.5, borders of zeros. The source's factor ``max``
    drops out of the relative map. As σ grows, the weights become equal. Source: Lin, Gao and Wang, "Pixel-level
    Self-Paced Learning for Super-Resolution", ICASSP 2020, where t counts epochs, alpha is 1 and beta 0.
    """

    @checked
    def __init__(
        self,
        alpha: Annotated[float, POSITIVE, "growth of σ from one t to the next"] = 1.0,
        beta: Annotated[float, POSITIVE, "σ at t = 0"] = 1.0,
    ) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta

    def map(self, sr: Tensor, gt: Tensor, t: float, **images: Tensor) -> Tensor:
        """The Gaussian of the SSIM map over its largest value, which a small σ would let underflow: (N, C, H, W)."""
        exponent = ((ssim_map(sr, gt) + 1) / (self.alpha * t + self.beta)).square()
        return (exponent.amin((-2, -1), keepdim=True) - exponent).exp()


def ssim_map(a: Tensor, b: Tensor, size: int = 11) -> Tensor:
    """SSIM (Wang et al., TIP 2004) of every pixel and channel of images in [0, 1], borders of zeros: (N, C, H, W)."""
    a, b = at_least_fp32(a), at_least_fp32(b)
    along = torch.arange(size, device=a.device, dtype=a.dtype) - size // 2
    row = (-(along**2) / (2 * SSIM_SIGMA**2)).exp()
    row = (row / row.sum()).view(1, 1, 1, size).expand(a.shape[1], 1, 1, size)

    def blur(image: Tensor) -> Tensor:
        across = F.conv2d(image, row, padding=(0, size // 2), groups=a.shape[1])
        return F.conv2d(across, row.mT, padding=(size // 2, 0), groups=a.shape[1])

    with torch.autocast(a.device.type, enabled=False):
        mean_a, mean_b = blur(a), blur(b)
        squares, product = blur(a * a + b * b), blur(a * b)
    means = mean_a * mean_b
    mean_squares = mean_a**2 + mean_b**2
    return (2 * means + C1) * (2 * (product - means) + C2) / ((mean_squares + C1) * (squares - mean_squares + C2))


SHORT_NAMES: dict[str, type[Weighting]] = {"learned": LearnedWeights, "random": RandomWeights, "error": ErrorWeights}
