"""The equations of Trainable Loss Weights, to be read beside the paper (arXiv:2301.10575).

Notation: ``gt`` is the HR image x, ``sr`` the SR image x̂ = f_θ(y), ``w`` the weights g_φ(x, x̂) in [0, 1].
Images and weights are (N, C, H, W). Images are in [0, 1] everywhere; the equations and their constants belong to
[-1, 1], and :func:`to_paper_range` is where each of them goes there. A ``gt`` in another range is a ValueError on the
CPU; on other devices the equations don't read values, and :func:`check_range` does.

A *distance* D is any callable ``distance(a, b)`` on images in [0, 1] that returns one value per sample, shape (N,);
or a :class:`DistanceTo`, which has b = x already. A D of another shape is a ValueError.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

BASES = ("l1", "mse")
EPS_DISTANCE = 1e-3  # ε beside a distance, stochastic variant
MSE_FLOOR_DETERMINISTIC = 0.1  # added to sg|x̂ - x| in the weighted MSE
MSE_FLOOR_STOCHASTIC = 0.2
SQUEEZE = 0.999  # keeps the logit of p = 0 and p = 1 finite
OVERSHOOT = 0.01  # beyond [0, 1], where an image has been resized in floating point


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it is float64 already. Autocast hands over half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_images(sr: Tensor, gt: Tensor) -> None:
    """Check that both images are (N, C, H, W) and, on the CPU, that x is in [0, 1]; elsewhere that would be a wait.

    Raises:
        ValueError: names the shapes or the range.
    """
    if sr.shape != gt.shape or sr.ndim != 4:
        raise ValueError(f"sr and gt must both be (N, C, H, W), got {tuple(sr.shape)} and {tuple(gt.shape)}")
    if is_at_hand(gt):
        check_range(gt)


def is_at_hand(x: Tensor) -> bool:
    """Whether the values of ``x`` can be read without waiting for a device."""
    return x.device.type == "cpu"


def check_range(gt: Tensor) -> None:
    """Check that the smallest and largest values of x are in [0, 1]; NaN and Inf pass.

    Raises:
        ValueError: names the range.
    """
    low, high = torch.stack(gt.detach().aminmax()).tolist()
    if (low < -OVERSHOOT or high > 1 + OVERSHOOT) and math.isfinite(low) and math.isfinite(high):
        raise ValueError(f"gt must be an image in [0, 1], got values from {low:.3g} to {high:.3g}")


def one_per_sample(d: Tensor, images: Tensor) -> Tensor:
    """``d``, which must have one value for each of the N ``images``.

    Raises:
        ValueError: its shape is not (N,).
    """
    if not torch.is_tensor(d) or d.shape != images.shape[:1]:
        got = tuple(d.shape) if torch.is_tensor(d) else type(d).__name__
        raise ValueError(f"the distance must give one value per sample, shape ({len(images)},), got {got}")
    return d


def to_paper_range(image: Tensor) -> Tensor:
    """An image in [0, 1] as the equations have it, in [-1, 1] and at least float32."""
    return 2 * at_least_fp32(image) - 1


class DistanceTo:
    """D(·, x): a distance with its reference fixed, so that it is called with one batch of images."""

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor], gt: Tensor) -> None:
        self.distance, self.gt = distance, gt

    def __call__(self, a: Tensor) -> Tensor:
        """D(a, x) of images in [0, 1]: (N,). Another shape is a ValueError."""
        return one_per_sample(self.distance(a, self.gt), a)


Distance = Callable[[Tensor, Tensor], Tensor] | DistanceTo


def fix_reference(distance: Distance, gt: Tensor) -> DistanceTo:
    """D(·, x) of a distance; a :class:`DistanceTo` is returned as it is."""
    return distance if isinstance(distance, DistanceTo) else DistanceTo(distance, gt)


def fixed_sum(x: Tensor, k: float | Tensor) -> Tensor:
    r"""Move the mean of every channel to exactly ``k``, keeping [0, 1] and the order of the pixels (FixedSum).

    With S = Σz over the H·W pixels of a channel and T = k·H·W::

        α = relu((T - S) / (HW - S)),  β = relu((S - T) / S),  out = z + α(1 - z) - βz

    The channel is the identity where its mean is ``k`` already. Sums are taken as means, and HW - S as the sum of
    1 - z, which loses no digits where z is close to 1.

    Args:
        x: weights z in [0, 1], shape (N, C, H, W) or any (..., H, W).
        k: the mean of the result, in (0, 1); a 0-dim tensor is not checked, which would be a wait for its device.

    Returns:
        Tensor of ``x``'s shape, at least float32.

    Raises:
        ValueError: ``k`` is not in (0, 1).
    """
    if not torch.is_tensor(k) and not 0.0 < k < 1.0:
        raise ValueError(f"fixed_sum: k must be in (0, 1), got {k}")
    z = at_least_fp32(x)
    mean = z.mean(dim=(-2, -1), keepdim=True)
    room = (1 - z).mean(dim=(-2, -1), keepdim=True)
    # Where a numerator is positive its denominator is at least the bound: clamping only spares 0/0 elsewhere.
    alpha = (torch.relu(k - mean) / room.clamp_min(1 - k)).clamp_max(1)
    beta = (torch.relu(mean - k) / mean.clamp_min(k)).clamp_max(1)
    return z + alpha * (1 - z) - beta * z


def relaxed_bernoulli(p: Tensor, noise: Tensor | None = None, temperature: float = 0.1) -> Tensor:
    r"""Sample a relaxed Bernoulli variable of probability ``p``, differentiable in ``p``.

    With p' = 0.999 p + 0.0005 and u' = 0.999 u + 0.0005::

        b = sigmoid((logit p' + logit u') / temperature)

    Args:
        p: probabilities in [0, 1], any shape.
        noise: u in [0, 1), of a shape that broadcasts with ``p``; drawn from U(0, 1) in ``p``'s shape if None.
        temperature: above 0; the smaller, the closer to 0 and 1 the samples are.

    Returns:
        Samples in [0, 1] in the broadcast shape, at least float32.

    Raises:
        ValueError: ``temperature`` is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"relaxed_bernoulli: temperature must be above 0, got {temperature}")
    p = at_least_fp32(p)
    u = torch.rand_like(p) if noise is None else noise.to(p)
    half = (1 - SQUEEZE) / 2
    logit_p = torch.logit(SQUEEZE * p + half)
    logit_u = torch.logit(SQUEEZE * u + half)
    return torch.sigmoid((logit_p + logit_u) / temperature)


def sample_weights(w: Tensor, num_samples: int, noise: Tensor | None = None, temperature: float = 0.1) -> Tensor:
    """Draw ``num_samples`` weight maps from the probabilities ``w``: (N, C, H, W) to (S, N, C, H, W)."""
    shape = (num_samples, *w.shape)
    if noise is None:
        noise = torch.rand(shape, device=w.device, dtype=torch.float32)
    return relaxed_bernoulli(w, noise, temperature)  # which takes the logit of w once for all samples


def relative(x: Tensor) -> Tensor:
    """A map of at least 0 over its maximum in each sample and channel, in [0, 1]; 0 where all of it is 0."""
    largest = x.amax(dim=(-2, -1), keepdim=True)
    return x / largest.clamp_min(torch.finfo(x.dtype).tiny)


def absolute_error(sr: Tensor, gt: Tensor) -> Tensor:
    """|x̂ - x| in the images' own range, at least float32."""
    return (at_least_fp32(sr) - at_least_fp32(gt)).abs()


@torch.no_grad()
def relative_error(sr: Tensor, gt: Tensor) -> Tensor:
    """|x̂ - x| over its maximum in each sample and channel, in [0, 1]; 0 without any error. No gradient."""
    return relative(absolute_error(sr, gt))


@torch.no_grad()
def error_weights(sr: Tensor, gt: Tensor, k: float | Tensor) -> Tensor:
    r"""Weights in proportion to the error, without learning: w = FixedSum_k(|x̂ - x| / max_{h,w} |x̂ - x|).

    Images may be of any range. The weights, of mean ``k`` in (0, 1) in every channel, are at least float32 and have no
    gradient; they are ``k`` everywhere without any error.
    """
    return fixed_sum(relative_error(sr, gt), k)


def mix(sr: Tensor, gt: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The two mixtures x_w = w·x + (1 - w)·x̂ and x_{1-w} = (1 - w)·x + w·x̂ of images in [0, 1], in [0, 1]."""
    w, x, x_hat = at_least_fp32(w), to_paper_range(gt), to_paper_range(sr)
    return (w * x + (1 - w) * x_hat + 1) / 2, ((1 - w) * x + w * x_hat + 1) / 2


def weight_criterion_loss(distance: Distance, sr: Tensor, gt: Tensor, w: Tensor, eps: float = EPS_DISTANCE) -> Tensor:
    r"""L_φ, the loss of the weighting network: minus the log of the weight criterion WC.

    WC(w) = D(x_{1-w}, x) / D(x_w, x) is large where the weighted pixels are the ones that matter to D::

        L_φ = mean_n [ log(|D(x_w, x)| + ε) - log(|D(x_{1-w}, x)| + ε) ]

    ``w`` is one sample of the weights, with ε = ``eps`` = 1e-3 (stochastic variant), or the map itself with 0, the
    plain log D (deterministic). No gradient goes to x̂. The loss, a scalar, is finite even where D is 0: log arguments
    are kept at or above the smallest normal number.
    """
    check_images(sr, gt)
    distance = fix_reference(distance, gt)
    x_w, x_1w = mix(sr.detach(), gt, w)
    return (_log_distance(distance(x_w), eps) - _log_distance(distance(x_1w), eps)).mean()


def _log_distance(d: Tensor, eps: float) -> Tensor:
    d = at_least_fp32(d).abs() + eps
    return d.clamp_min(torch.finfo(d.dtype).tiny).log()


def pixel_error(sr: Tensor, gt: Tensor, base: str, floor: float) -> Tensor:
    """ℓ per pixel, of images in [0, 1] that are brought to [-1, 1]: (N, C, H, W), at least float32.

    |x̂ - x| (``'l1'``), or (x̂ - x)² / (sg|x̂ - x| + floor) (``'mse'``, the paper's l2).
    """
    if base not in BASES:
        raise ValueError(f"base must be one of {', '.join(BASES)}, got {base!r}")
    check_images(sr, gt)
    error = (to_paper_range(sr) - to_paper_range(gt)).abs()
    return error if base == "l1" else error.square() / (error.detach() + floor)


def weighted_pixel_loss(sr: Tensor, gt: Tensor, w: Tensor, base: str = "l1") -> Tensor:
    r"""L_θ of the deterministic variant, a scalar: mean(w·ℓ), ℓ of :func:`pixel_error` with the floor 0.1.

    Its gradient goes to x̂, none to the weights.
    """
    return (at_least_fp32(w.detach()) * pixel_error(sr, gt, base, MSE_FLOOR_DETERMINISTIC)).mean()


@torch.no_grad()
def importance_log_ratio(distance: Distance, sr: Tensor, gt: Tensor, ws: Tensor) -> Tensor:
    """log r_s, with r_s = D(x_{1-w_s}, x) / (|D(x_{w_s}, x)| + 1e-3), for every sample: (S, N), no gradient."""
    distance = fix_reference(distance, gt)
    ratios = []
    for w in ws:
        x_w, x_1w = mix(sr, gt, w)
        ratios.append(distance(x_1w) / (distance(x_w).abs() + EPS_DISTANCE))
    r = at_least_fp32(torch.stack(ratios))
    return r.clamp_min(torch.finfo(r.dtype).tiny).log()


def marginal_pixel_loss(distance: Distance | None, sr: Tensor, gt: Tensor, ws: Tensor, base: str = "l1") -> Tensor:
    r"""L_θ of the stochastic variant: the likelihood of x, with the sampled weights marginalised out.

    With e_s = mean over C, H, W of w_s·ℓ, ℓ of :func:`pixel_error` with the floor 0.2, and r_s of
    :func:`importance_log_ratio`, or 1 where ``distance`` is None::

        L_θ = mean_n [ -log( Σ_s r_s exp(-e_s) / Σ_s r_s ) ]

    ``ws`` are S samples of the weights, (S, N, C, H, W). The gradient of the loss, a scalar, goes to x̂, none to them.
    """
    ws = at_least_fp32(ws.detach())
    error = pixel_error(sr, gt, base, MSE_FLOOR_STOCHASTIC)
    e = torch.stack([(w * error).mean(dim=(1, 2, 3)) for w in ws])
    log_r = torch.zeros_like(e) if distance is None else importance_log_ratio(distance, sr, gt, ws)
    return -torch.logsumexp(torch.log_softmax(log_r, dim=0) - e, dim=0).mean()


def k_schedule(t: float, k_start: float = 0.3, k_end: float = 0.9, k_decay: float = 100.0) -> float:
    r"""k(t) = k_start + (k_end - k_start)·(1 - exp(-t / k_decay)), with t in epochs (the paper's) or iterations."""
    return k_start + (k_end - k_start) * (1 - math.exp(-t / k_decay))


def uncertainty_loss(sr: Tensor, gt: Tensor, s: Tensor) -> Tensor:
    r"""L_ESU, stage one of the uncertainty baseline: mean(exp(-s)·|x̂ - x| + 2s).

    The gradient of the loss, a scalar, goes to x̂ and to the log-variance map s (N, C, H, W).
    Source: Ning et al., "Uncertainty-Driven Loss for Single Image Super-Resolution", NeurIPS 2021.
    """
    s = at_least_fp32(s)
    return ((-s).exp() * pixel_error(sr, gt, "l1", 0) + 2 * s).mean()


def uncertainty_driven_loss(sr: Tensor, gt: Tensor, s: Tensor) -> Tensor:
    r"""L_UDL, stage two of the uncertainty baseline: mean((s - min s)·|x̂ - x|), the minimum of each channel.

    As :func:`uncertainty_loss`, but no gradient goes to s.
    """
    s = at_least_fp32(s.detach())
    return ((s - s.amin(dim=(-2, -1), keepdim=True)) * pixel_error(sr, gt, "l1", 0)).mean()
