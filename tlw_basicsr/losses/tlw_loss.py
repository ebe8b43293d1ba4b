"""The pixel loss with trainable weights: the paper's equations on BasicSR's images."""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from tlw_basicsr.errors import UserError
from tlw_basicsr.functional import (
    BASES,
    EPS_DISTANCE,
    Distance,
    error_weights,
    marginal_pixel_loss,
    sample_weights,
    weight_criterion_loss,
    weighted_pixel_loss,
)

WEIGHTS = ("learned", "random", "error")


def signed(image: Tensor) -> Tensor:
    """BasicSR's range [0, 1] to the equations' range [-1, 1]."""
    return 2 * image - 1


class _EagerGradient(torch.autograd.Function):
    """A distance whose gradient is computed together with its value, so that the graph of one is freed before the next.

    Each sample's distance depends on that sample alone, so the gradient of their sum holds that of each.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, distance: Callable[[Tensor], Tensor]) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return distance(a)
        half = torch.is_autocast_enabled(a.device.type) and torch.get_autocast_dtype(a.device.type) == torch.float16
        scale = 1024.0 if half else 1.0  # fp16 has no room for the small gradients of a mean over pixels
        with torch.enable_grad():
            leaf = a.detach().requires_grad_()
            d = distance(leaf)
            (gradient,) = torch.autograd.grad(d.sum() * scale, leaf)
        ctx.save_for_backward(gradient / scale)
        return d.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.view(-1, 1, 1, 1), None


@LOSS_REGISTRY.register()
class TLWLoss(nn.Module):
    """Trainable Loss Weights (arXiv:2301.10575): L_φ for the weighting network, L_θ for the SR network.

    It takes the weights as an argument and holds no weighting network: :class:`TLWModel` owns that, and calls
    :meth:`weight_loss` in its E step and :meth:`forward` in its M step. Images are in [0, 1].

    Two controls without learning, at about the cost of plain L1, tell what the learning is worth. They have no
    weighting network, no distance and no E step; their weights are :meth:`control_weights`:

    - ``weights='random'``: ``num_samples`` relaxed Bernoulli samples of the constant map k, in the stochastic L_θ with
      r_s = 1;
    - ``weights='error'``: :func:`tlw_basicsr.error_weights` in the deterministic L_θ.

    Args:
        distance: options of D, ``{type: a registered loss that gives one value per sample, …}``, or such a module. A
            sample's value must depend on that sample alone. None for the paper's, ``{type: LPIPSDistance, net: vgg}``.
            The controls have none.
        base: ``'l1'`` or ``'mse'`` (the paper's l2).
        weights: ``'learned'`` by the weighting network, or a control, ``'random'`` or ``'error'``.
        stochastic: the variant with sampled weights, the paper's for its tables; else the deterministic one. Of learned
            weights only.
        num_samples: S, samples of the weights in one M step (stochastic variant).
        loss_weight: factor of L_θ.
        reduction: ``'mean'`` is the only one; the option is there for YAML files of BasicSR's losses.

    Attributes:
        importance: take the ratios r_s into account in the M step (stochastic variant); without them (r_s = 1) it
            needs no distance.
        chunk: samples of a batch that go through the distance at a time, None for all: less memory, on a GPU for more
            time, with the same result.
    """

    def __init__(
        self,
        distance: dict[str, Any] | nn.Module | None = None,
        base: Literal["l1", "mse"] = "l1",
        stochastic: bool = True,
        num_samples: int = 3,
        loss_weight: float = 1.0,
        reduction: Literal["mean"] = "mean",
        weights: Literal["learned", "random", "error"] = "learned",
    ) -> None:
        super().__init__()
        if base not in BASES:
            raise UserError(f"TLWLoss: base must be one of {', '.join(BASES)}, got {base!r}")
        if reduction != "mean":
            raise UserError(f"TLWLoss: reduction must be mean, got {reduction!r}")
        if num_samples < 1:
            raise UserError(f"TLWLoss: num_samples must be at least 1, got {num_samples}")
        if weights not in WEIGHTS:
            raise UserError(f"TLWLoss: weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
        learned = weights == "learned"
        if not learned and distance is not None:
            raise UserError(f"TLWLoss: distance is not used with weights: {weights}; delete it")
        if weights == "random" and not stochastic:
            raise UserError("TLWLoss: stochastic must be true with weights: random, which are sampled")
        if learned and not isinstance(distance, nn.Module):
            options = {"type": "LPIPSDistance", "net": "vgg"} if distance is None else dict(distance)
            distance = LOSS_REGISTRY.get(options.pop("type"))(**options)
        self.distance = distance
        self.base = base
        self.weights = weights
        self.stochastic = stochastic and weights != "error"
        self.num_samples = num_samples
        self.loss_weight = loss_weight
        self.importance = learned
        self.chunk: int | None = None

    def distance_to(self, gt: Tensor) -> Distance:
        """D(·, x) on [-1, 1] images, with the features of x = ``gt`` computed once, when they are first needed.

        The result is a ``distance(a, b)`` for this x alone: the equations compare with nothing else, so ``b`` is not
        looked at.
        """
        parts = [self._distance_to_part(part) for part in gt.detach().split(self.chunk or len(gt))]

        def distance(a: Tensor, _: Tensor) -> Tensor:
            pieces = a.split(self.chunk or len(a))
            return torch.cat([_EagerGradient.apply(piece, part) for part, piece in zip(parts, pieces, strict=True)])

        return distance

    def _distance_to_part(self, gt: Tensor) -> Callable[[Tensor], Tensor]:
        d = self.distance
        if not hasattr(d, "features"):
            return lambda a: d((a + 1) / 2, gt)

        @cache
        def reference() -> Any:
            with torch.no_grad():
                return d.features(gt)

        return lambda a: d.compare(d.features((a + 1) / 2), reference())

    def control_weights(self, sr: Tensor, gt: Tensor, k: float) -> Tensor:
        """The weights of a control, of mean ``k``, for :meth:`forward`: (N, C, H, W); those of ``random`` are all k."""
        return torch.full_like(gt, k) if self.weights == "random" else error_weights(sr, gt, k)

    def weight_loss(self, sr: Tensor, gt: Tensor, w: Tensor, distance: Distance) -> Tensor:
        """L_φ of the weights ``w`` = g_φ(x, x̂), through one sample of them in the stochastic variant: scalar.

        ``sr``, ``gt`` in [0, 1] and ``w`` are (N, C, H, W); ``distance`` is :meth:`distance_to` of ``gt``.
        """
        sr, gt = signed(sr), signed(gt)
        if not self.stochastic:
            return weight_criterion_loss(distance, sr, gt, w, eps=0.0)
        return weight_criterion_loss(distance, sr, gt, sample_weights(w, 1)[0], eps=EPS_DISTANCE)

    def forward(self, sr: Tensor, gt: Tensor, w: Tensor, distance: Distance | None = None) -> Tensor:
        """``loss_weight``·L_θ of the SR image under the weights ``w`` = g_φ(x, x̂), which get no gradient: scalar.

        ``sr``, ``gt`` in [0, 1] and ``w`` are (N, C, H, W); ``distance`` is :meth:`distance_to` of ``gt``, computed
        here if None and needed.
        """
        if not self.stochastic:
            return self.loss_weight * weighted_pixel_loss(signed(sr), signed(gt), w, self.base)
        distance = (distance or self.distance_to(gt)) if self.importance else None
        ws = sample_weights(w.detach(), self.num_samples)
        return self.loss_weight * marginal_pixel_loss(distance, signed(sr), signed(gt), ws, self.base)
