"""Trainable Loss Weights for any training loop: one object, to be read beside ``functional.py``."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Adam, Optimizer

from tlw_basicsr.core.arguments import BOOL, FRACTION, POSITIVE, Kind, checked, or_none, whole
from tlw_basicsr.core.distances import CachedDistanceTo, LPIPSDistance, SSIMDistance
from tlw_basicsr.core.functional import (
    at_least_fp32,
    check_range,
    is_at_hand,
    k_schedule,
    marginal_pixel_loss,
    sample_weights,
    weighted_pixel_loss,
)
from tlw_basicsr.core.graphs import RECORDERS, RecordedLoss, copy_all, list_buffers
from tlw_basicsr.core.weight_net import TLWWeightNet
from tlw_basicsr.core.weightings import SHORT_NAMES, LearnedWeights, RandomWeights, Weighting

EXACT: dict[str, Any] = {"importance": True, "weight_interval": 1}
PRESETS: dict[str, dict[str, Any]] = {
    "exact": EXACT,
    "fast": {"importance": False, "weight_interval": 2},
    "economy": {"importance": False, "weight_interval": 8, "weight_batch": 4, "weight_crop": 48},
    "paper": {"k_start": 0.3, "k_end": 0.9, "k_decay": 100.0, **EXACT},
}
"""Arguments of :class:`TLW` by name. ``exact`` pins the published mathematics, ``paper`` also the published schedule of
k; both are the defaults today. ``fast`` and ``economy`` have cheaper E steps."""

# what the economy preset has besides: arguments of the weighting network and of its Adam
ECONOMY_NET_W: dict[str, Any] = {"num_feat": 16, "prior": "error"}
ECONOMY_OPTIM_W: dict[str, Any] = {"lr": 1e-3, "betas": (0.5, 0.999)}
FIRST_LOOKS = 3  # calls in which the range of x is read at once, on a device that has to be waited for
NEARLY_CONSTANT = 0.01  # standard deviation of weights that hardly tell pixels apart

# the arguments that a YAML has in pixel_opt
Base = Annotated[Literal["l1", "mse"], "ℓ of a pixel; `mse` is the paper's l2"]
WEIGHTS = Kind(
    f"one of {', '.join(SHORT_NAMES)}, or a Weighting",
    lambda v: isinstance(v, Weighting) or (isinstance(v, str) and v in SHORT_NAMES),
)
Stochastic = Annotated[bool, "relaxed Bernoulli samples of the weights, the variant of the paper's tables; or the map"]
NumSamples = Annotated[int, whole(1, 1000), "samples in one M step"]
LossWeight = Annotated[float, "factor of the loss of the SR network"]

MODULE = or_none(Kind("a module, such as SSIMDistance()", lambda v: isinstance(v, nn.Module)))
MakeOptimizer = Callable[[Iterator[nn.Parameter]], Optimizer]


def make_adam(parameters: Iterator[nn.Parameter], lr: float = 1e-4, betas: tuple[float, float] = (0.5, 0.999)) -> Adam:
    """The published optimiser of the weighting network."""
    return Adam(parameters, lr, betas)


class TLW(nn.Module):
    r"""Trainable Loss Weights (TLW, arXiv:2301.10575): a pixel loss whose weights a small network g_φ learns.

    A call is one iteration of expectation-maximisation on x̂ = ``sr`` and x = ``gt``:

    - E step, where one is due: an optimiser step on φ with L_φ, :func:`tlw_basicsr.weight_criterion_loss`, x̂ detached;
    - M step: fresh weights w = g_φ(x, x̂) without gradient, and L_θ of :func:`tlw_basicsr.marginal_pixel_loss`
      (stochastic) or :func:`tlw_basicsr.weighted_pixel_loss`, which is returned for the caller to minimise over θ.

    ::

        tlw = TLW(LPIPSDistance("vgg")).to(device)
        for epoch in range(100):
            for lq, gt in loader:
                loss = tlw(net(lq), gt, t=epoch)
                optimizer.zero_grad(); loss.backward(); optimizer.step()

    Images are (N, C, H, W), or (N, T, C, H, W) of a video, whose frames count as samples; x is in [0, 1].
    ``state_dict()`` holds φ, its optimiser, the number of calls and that of the last E step, but not D. In eval mode
    and without gradients there is no E step. An E step whose loss or gradient is not finite changes nothing and is due
    again; this is checked in each E step unless the optimiser has a ``guard`` of its own. Images of any floating-point
    type are converted to that of φ. φ and D stay in at least float32: use autocast for half precision, not ``.half()``.
    With torch.distributed the gradients of φ are averaged over the processes, and all start with φ of the first one.

    Args:
        distance: D, a module ``distance(a, b)`` on images in [0, 1] with one value per sample, which depends on that
            sample alone. None for the paper's, ``LPIPSDistance("vgg")``. The controls take no distance.
        base: ℓ of a pixel, see :func:`tlw_basicsr.core.functional.pixel_error`.
        weights: ``'learned'``; a control, which learns nothing and costs about as much as ℓ alone: ``'random'`` samples
            the constant map k, ``'error'`` takes :func:`tlw_basicsr.error_weights` as they are; or any
            :class:`tlw_basicsr.Weighting`, such as ``LDLWeights()``.
        stochastic: relaxed Bernoulli samples of the weights, the variant of the paper's tables; else the map itself,
            which a weighting that is not ``sampled`` always takes.
        num_samples: S, samples in an M step.
        loss_weight: factor of L_θ.
        net_w: g_φ, a module ``net_w(sr, gt, k)``; None for ``TLWWeightNet()``.
        optimizer: makes the optimiser from the parameters φ; None for Adam 1e-4, betas (0.5, 0.999).
        k_start: mean of the weights, k, at t = 0.
        k_end: mean of the weights in the end.
        k_decay: time constant of the way from one to the other, see :func:`tlw_basicsr.k_schedule`.
        importance: use the ratios r_s in L_θ; without them, r_s = 1, the M step needs no D.
        weight_interval: calls from one E step to the next.
        weight_batch: samples of the batch in an E step, drawn anew each time; all if None.
        weight_crop: side of the square of x and x̂ in an E step, at a place drawn anew each time; all if None.
        distance_chunk: samples that go through D at a time, all if None: less memory for more time.
        use_amp: ``'bf16'`` runs D, and on a GPU g_φ, under autocast; FixedSum and the losses stay in float32.
        use_graphs: replay both steps as CUDA graphs, see :class:`tlw_basicsr.core.graphs.RecordedLoss`; then
            ``log["w"]`` and ``log["l_w"]`` are overwritten by later calls. None does so on a GPU without importance,
            with this package's own g_φ and D; True with any g_φ and D whose forward does nothing but compute.

    Raises:
        ValueError: an argument is not what is accepted, or does not go with another.
    """

    @checked
    def __init__(
        self,
        distance: Annotated[nn.Module | None, MODULE] = None,
        *,
        base: Base = "l1",
        weights: Annotated[str | Weighting, WEIGHTS] = "learned",
        stochastic: Stochastic = True,
        num_samples: NumSamples = 3,
        loss_weight: LossWeight = 1.0,
        net_w: Annotated[nn.Module | None, MODULE] = None,
        optimizer: MakeOptimizer | None = None,
        k_start: Annotated[float, FRACTION, "mean of the weights at t = 0"] = 0.3,
        k_end: Annotated[float, FRACTION, "mean of the weights in the end"] = 0.9,
        k_decay: Annotated[float, POSITIVE, "t after which 63% of the way from `k_start` to `k_end` is done"] = 100.0,
        importance: Annotated[bool, "with the ratios r_s in the M step, which needs D for them"] = True,
        weight_interval: Annotated[int, whole(1), "iterations from one E step to the next"] = 1,
        weight_batch: Annotated[int | None, or_none(whole(1)), "samples of a batch in an E step; ~ for all"] = None,
        weight_crop: Annotated[int | None, or_none(whole(1)), "side of a random crop in an E step; ~ for all"] = None,
        distance_chunk: Annotated[int | None, or_none(whole(1)), "samples that go through D at a time"] = None,
        use_amp: Annotated[Literal[False, "bf16"], "autocast of D and the weighting network"] = False,
        use_graphs: Annotated[bool | None, or_none(BOOL), "CUDA graphs of both steps; ~ where it is safe"] = None,
    ) -> None:
        super().__init__()
        self.weighting = weights if isinstance(weights, Weighting) else SHORT_NAMES[weights]()
        learned = isinstance(self.weighting, LearnedWeights)
        if not learned and any(part is not None for part in (distance, net_w, optimizer)):
            raise ValueError(f"TLW: distance, net_w and optimizer are not used with weights={weights!r}")
        if isinstance(self.weighting, RandomWeights) and not stochastic:
            raise ValueError("TLW: stochastic must be True with weights='random', which are sampled")
        self.base, self.num_samples, self.loss_weight = base, num_samples, loss_weight
        self.stochastic = stochastic and self.weighting.sampled
        self.k_start, self.k_end, self.k_decay = k_start, k_end, k_decay
        self.importance = importance and learned
        self.weight_interval, self.weight_batch, self.weight_crop = weight_interval, weight_batch, weight_crop
        self.distance_chunk, self.use_amp, self.use_graphs = distance_chunk, use_amp, use_graphs
        self.net_w = (net_w or TLWWeightNet()) if learned else None
        # in a list, so that D's parameters are not among the module's, nor in its state
        self._distance = [(distance or LPIPSDistance("vgg")).requires_grad_(False)] if learned else []
        self.optimizer = (optimizer or make_adam)(self.net_w.parameters()) if self.net_w is not None else None
        self.calls = 0
        self.last_e_step: int | None = None
        self.skipped = 0
        self.log: dict[str, Tensor] = {}
        self._e_sample: tuple[Tensor, Tensor, float, Tensor | None] | None = None
        self._to_gt: CachedDistanceTo | None = None
        self._shared = False
        self._looks, self._extremes = 0, torch.zeros(2)
        self._recorded: dict[str, RecordedLoss] = {}

    @classmethod
    def from_preset(cls, preset: str, distance: nn.Module | None = None, **changes: Any) -> "TLW":
        """The object with the values of a preset of :data:`PRESETS`; ``changes`` override them.

        ``economy`` also has a smaller weighting network, and a higher learning rate of its Adam.
        """
        if preset not in PRESETS:
            raise ValueError(f"TLW: preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        weights = changes.get("weights", "learned")
        if preset == "economy" and (weights == "learned" or isinstance(weights, LearnedWeights)):
            changes.setdefault("net_w", TLWWeightNet(**ECONOMY_NET_W))
            changes.setdefault("optimizer", lambda parameters: make_adam(parameters, **ECONOMY_OPTIM_W))
        return cls(distance, **{**PRESETS[preset], **changes})

    # ------------------------------------------------------------------------------------------------- the iteration

    def forward(
        self, sr: Tensor, gt: Tensor, t: float | None = None, *, iteration: int | None = None, **images: Tensor
    ) -> Tensor:
        """One iteration: the E step on φ where one is due, then ``loss_weight``·L_θ.

        Args:
            sr: x̂ (N, C, H, W) or (N, T, C, H, W), with gradient.
            gt: x in [0, 1], of the same shape.
            t: epoch or iteration from 0, from which k follows; None counts the calls.
            iteration: the number of this call, for a loop that does not call in every iteration; ``weight_interval``
                counts from it. None counts the calls.
            **images: what the weighting ``needs``, such as ``sr_ema`` or ``mask``; others are left out.

        Returns:
            Scalar.

        Raises:
            ValueError: the shapes are others, x is not in [0, 1], an image has no floating-point numbers or a number of
                channels that φ or D does not take, D does not give one value per sample, or an image is missing that
                the weighting needs.
        """
        self.calls = self.calls if iteration is None else iteration
        t = self.calls if t is None else t
        sr, gt = self._take_images(sr, gt)
        due = self.last_e_step is None or self.calls - self.last_e_step >= self.weight_interval
        if self.net_w is not None and self.training and due and torch.is_grad_enabled():
            self.e_step(sr, gt, t)
        loss = self.m_loss(sr, gt, t, **images)
        self.calls += self.training
        return loss

    def e_step(self, sr: Tensor, gt: Tensor, t: float | None = None) -> Tensor:
        """One step on φ with L_φ, on ``weight_batch`` samples of side ``weight_crop``; returns L_φ, scalar, detached.

        Arguments and errors as :meth:`forward`.
        """
        if self.net_w is None or self.optimizer is None:
            raise ValueError(f"TLW: there is no E step with {type(self.weighting).__name__}")
        self._share_start_values()
        before = self._copy_buffers()
        k = self.k(t)
        sr, gt = self._draw_part(*self._take_images(sr.detach(), gt))
        noise = torch.rand((1, *gt.shape), device=gt.device) if self.stochastic else None
        (l_w,) = self._loss("_e_loss", sr, gt, k, noise)
        self.optimizer.zero_grad()
        l_w.backward()
        self._average_gradients()
        if not hasattr(self.optimizer, "guard") and not self._is_finite(l_w.detach()):
            for owner, name, buffer, value in before:
                owner[name] = buffer.copy_(value)
            self.skipped += 1
            return l_w.detach()
        self.optimizer.step()
        self.last_e_step = self.calls
        self.log["l_w"] = l_w.detach()
        self._e_sample = (sr, gt, k, noise)
        return self.log["l_w"]

    def m_loss(self, sr: Tensor, gt: Tensor, t: float | None = None, **images: Tensor) -> Tensor:
        """Return ``loss_weight``·L_θ with fresh weights, which get no gradient: scalar.

        Arguments and errors as :meth:`forward`.
        """
        self._share_start_values()
        sr, gt = self._take_images(sr, gt)
        if not is_at_hand(gt):
            self._look_at(gt)
        more = (self.calls if t is None else t, self._take_needed(images))
        loss, self.log["w"] = self._loss("_m_loss", sr, gt, self.k(t), None, *more)
        self._to_gt = None  # its features of x are large
        return self.loss_weight * loss

    def k(self, t: float | None = None) -> float:
        """The mean of the weights at ``t``, or at this call if None."""
        return k_schedule(self.calls if t is None else t, self.k_start, self.k_end, self.k_decay)

    # ------------------------------------------------------------------------------------------------- looking

    @torch.no_grad()
    def weights(self, sr: Tensor, gt: Tensor, t: float | None = None, **images: Tensor) -> Tensor:
        """The weights w of images, to look at: in [0, 1], (N, C, H, W). Batch norm is in eval mode meanwhile."""
        sr, gt = self._take_images(sr, gt)
        modes = {} if self.net_w is None else {module: module.training for module in self.net_w.modules()}
        if self.net_w is not None:
            self.net_w.eval()
        try:
            return self._map(sr, gt, self.k(t), self.calls if t is None else t, self._take_needed(images))
        finally:
            for module, mode in modes.items():
                module.training = mode

    @torch.no_grad()
    def summarize(self) -> dict[str, Tensor]:
        """Return statistics of the last call and the last E step: scalars, on the device.

        ``w_mean``, ``w_std`` of the weights; ``l_w`` = L_φ; ``wc`` = exp(-L_φ), the geometric mean of the weight
        criterion; and ``wc_gain``, how many times that of the constant map k for the same images and noise it is. WC
        grows with k whatever is learned, the gain does not. It costs two more D, here and nowhere else. ``skipped`` is
        the number of E steps that were not finite, where there are any.

        Raises:
            ValueError: the x of a call since the last summary was not in [0, 1].
        """
        extremes = self._extremes.clone()
        self._extremes.zero_()
        check_range(extremes)
        summary = {}
        if self._e_sample is not None:
            sr, gt, k, noise = self._e_sample
            constant = self._criterion_loss(sr, gt, torch.full_like(gt, k), noise)
            l_w = self.log["l_w"]
            summary.update(l_w=l_w, wc=(-l_w).exp(), wc_gain=(constant - l_w).exp())
            self._to_gt = None
        if "w" in self.log:
            summary.update(w_mean=self.log["w"].mean(), w_std=self.log["w"].std())
        return summary | ({"skipped": torch.tensor(float(self.skipped))} if self.skipped else {})

    @property
    def graphs_failure(self) -> str | None:
        """Why a step is not replayed as a graph though it should be, or None."""
        return next((each.failure for each in self._recorded.values() if each.failure), None)

    # ------------------------------------------------------------------------------------------------- parts

    def _loss(
        self, name: str, sr: Tensor, gt: Tensor, k: float, noise: Tensor | None, *more: Any
    ) -> tuple[Tensor, ...]:
        """What the method ``name`` returns, replayed where ``use_graphs`` and the device have it.

        A weighting that may depend on ``more``, t and further images, is not recorded.
        """
        function, known = getattr(self, name), (TLWWeightNet, LPIPSDistance, SSIMDistance, type(None))
        if type(self.weighting) not in SHORT_NAMES.values():
            return function(sr, gt, k, noise, *more)
        safe = not self.importance and type(self.net_w) in known and type(self.distance) in known
        if gt.device.type not in RECORDERS or not (safe if self.use_graphs is None else self.use_graphs):
            return function(sr, gt, k, noise)
        if not self.training or not torch.is_grad_enabled() or (name == "_m_loss" and not sr.requires_grad):
            return function(sr, gt, k, noise)
        if name == "_m_loss":
            sr = at_least_fp32(sr)  # its gradient is not yet scaled for half precision
            noise = torch.rand((self.num_samples, *gt.shape), device=gt.device) if self.stochastic else None
        nets = [net for net in (self.net_w, self.distance) if net is not None]
        if name not in self._recorded:
            self._recorded[name] = RecordedLoss(function, lambda: nets)
        return self._recorded[name](sr, gt, k, noise)

    def _e_loss(self, sr: Tensor, gt: Tensor, k: Any, noise: Tensor | None) -> tuple[Tensor]:
        """L_φ, with gradient to φ."""
        self._forget_features(k)
        assert self.net_w is not None
        with self._autocast(gt.device, self.net_w):
            w = self.net_w(sr, gt, k)
        return (self._criterion_loss(sr, gt, w, noise),)

    def _m_loss(
        self, sr: Tensor, gt: Tensor, k: Any, noise: Tensor | None, t: float = 0.0, images: Any = None
    ) -> tuple[Tensor, Tensor]:
        """L_θ, with gradient to x̂, and the weights."""
        self._forget_features(k)
        with torch.no_grad():
            if not is_at_hand(gt):  # the smallest and largest values of x that are finite
                low, high = (value.float().nan_to_num(0.0, 0.0, 0.0) for value in gt.aminmax())
                self._extremes.copy_(torch.stack([low.minimum(self._extremes[0]), high.maximum(self._extremes[1])]))
            w = self._map(sr.detach(), gt, k, t, images or {})
        if not self.stochastic:
            return weighted_pixel_loss(sr, gt, w, self.base), w
        ws = sample_weights(w, self.num_samples, noise)
        with self._autocast(gt.device, self.distance):
            return marginal_pixel_loss(self._distance_to(gt) if self.importance else None, sr, gt, ws, self.base), w

    def _forget_features(self, k: Any) -> None:
        """Where a step is recorded, which k as a tensor shows, it computes D's features of x: the next x has others."""
        if torch.is_tensor(k):
            self._to_gt = None

    def _look_at(self, gt: Tensor) -> None:
        """Check the range of x in the first calls; later ones are checked by :meth:`summarize`."""
        if self._looks < FIRST_LOOKS:
            check_range(gt)
        self._looks += 1
        self._extremes = self._extremes.to(gt.device)

    def _map(self, sr: Tensor, gt: Tensor, k: Any, t: float, images: dict[str, Tensor]) -> Tensor:
        if self.net_w is None:
            return self.weighting(sr, gt, k, t, **images)
        before = self._copy_buffers()
        with self._autocast(gt.device, self.net_w):
            w = self.net_w(sr, gt, k)
        pairs = [(owner[name], old) for owner, name, _, old in before if owner[name].shape == old.shape]
        if pairs:  # no statistics of an x̂ that overflows, without a wait for the device
            finite = torch.stack([(new.isfinite() | ~old.isfinite()).all() for new, old in pairs]).all()
            for new, old in pairs:
                new.copy_(torch.where(finite, new, old))
        return w

    def _criterion_loss(self, sr: Tensor, gt: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        assert isinstance(self.weighting, LearnedWeights)
        with self._autocast(gt.device, self.distance):
            return self.weighting.e_loss(self._distance_to(gt), sr, gt, w, noise)

    def _distance_to(self, gt: Tensor) -> CachedDistanceTo:
        """D(·, x), the same for both steps of an iteration, so that the features of x are computed once."""
        if self._to_gt is None or not self._to_gt.is_of(gt):
            self._to_gt = CachedDistanceTo(self._distance[0], gt, self.distance_chunk)
        return self._to_gt

    def _take_images(self, sr: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
        """Both images with frames as samples, in the precision of φ."""
        sr, gt = fold_frames(sr, gt)
        if self.net_w is None:
            return sr, gt
        dtype = next((p.dtype for p in self.net_w.parameters()), torch.float32)
        return sr.to(dtype), gt.to(dtype)

    def _take_needed(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of ``images`` that the weighting needs, with frames as samples."""
        if missing := [name for name in self.weighting.needs if images.get(name) is None]:
            raise ValueError(f"TLW: {type(self.weighting).__name__} needs the image {missing[0]}")
        needed = {name: images[name] for name in self.weighting.needs}
        return {name: image.flatten(0, 1) if image.ndim == 5 else image for name, image in needed.items()}

    def _copy_buffers(self) -> list[tuple[dict[str, Tensor], str, Tensor, Tensor]]:
        """The places of φ's buffers, they and copies, unless φ's optimiser has a guard, which copies them itself."""
        if self.net_w is None or not self.net_w.training or hasattr(self.optimizer, "guard"):
            return []
        return [(owner, name, owner[name], owner[name].clone()) for owner, name in list_buffers([self.net_w])]

    @torch.no_grad()
    def _is_finite(self, l_w: Tensor) -> bool:
        """Whether L_φ and the gradient of φ are finite, in all processes; waits for the device."""
        assert self.net_w is not None
        gradients = [p.grad for p in self.net_w.parameters() if p.grad is not None]
        finite = torch.stack([l_w, get_total_norm(gradients, torch.inf)]).isfinite().all().float()
        if dist.is_initialized():
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        return bool(finite)

    def _draw_part(self, sr: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
        """``weight_batch`` random samples, each cut to the same random square; no random number if all is taken."""
        if self.weight_batch and self.weight_batch < len(gt):
            chosen = torch.randperm(len(gt))[: self.weight_batch].tolist()  # indices on the CPU need no upload
        else:
            chosen = []
        side = self.weight_crop
        if side and (side < gt.shape[-2] or side < gt.shape[-1]):
            top, left = (int(torch.randint(max(length - side, 0) + 1, ())) for length in gt.shape[-2:])
            sr, gt = (image[..., top : top + side, left : left + side] for image in (sr, gt))
        return (torch.stack([sr[i] for i in chosen]), torch.stack([gt[i] for i in chosen])) if chosen else (sr, gt)

    @contextmanager
    def _autocast(self, device: torch.device, part: nn.Module | None) -> Iterator[None]:
        """Autocast for g_φ or D: ``use_amp``, else that of the caller.

        Its cache is off: it would hand the M step the weights from before the E step. Under fp16 g_φ stays in float32,
        since its gradients have no room there; D's are scaled.
        """
        kind = device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        if self.use_amp and not (part is self.net_w and kind == "cpu"):  # measured: on CPUs D gains and g_φ loses
            enabled, dtype = True, torch.bfloat16
        elif part is self.net_w and dtype == torch.float16:
            enabled = False
        with torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False):
            yield

    # ------------------------------------------------------------------------------------------------- processes

    def _share_start_values(self) -> None:
        """Once, give every process the φ of the first."""
        if not self._shared and self.net_w is not None and dist.is_initialized():
            for tensor in self.net_w.state_dict().values():
                dist.broadcast(tensor, 0)
        self._shared = True

    def _average_gradients(self) -> None:
        if self.net_w is None or not dist.is_initialized():
            return
        gradients = [p.grad for p in self.net_w.parameters() if p.grad is not None]
        joined = torch.cat([g.flatten() for g in gradients]) / dist.get_world_size()
        dist.all_reduce(joined)
        means = joined.split([g.numel() for g in gradients])
        copy_all(gradients, [mean.view_as(g) for g, mean in zip(gradients, means, strict=True)])

    # ------------------------------------------------------------------------------------------------- states

    @property
    def distance(self) -> nn.Module | None:
        """The distance D, or None for a control."""
        return self._distance[0] if self._distance else None

    def get_extra_state(self) -> dict[str, Any]:
        """What ``state_dict()`` has beside φ: its optimiser's state and the position."""
        optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        return {"calls": self.calls, "last_e_step": self.last_e_step, "optimizer": optimizer}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        self.calls, self.last_e_step = state["calls"], state["last_e_step"]
        if self.optimizer is not None:
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # torch would share its tensors

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TLW":
        """Let ``.to(device)`` and the like also move D and the optimiser's moments; nothing goes to half precision."""

        def keep(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            half = new.dtype != tensor.dtype and new.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(new.device) if half else new

        super()._apply(keep, recurse)
        for distance in self._distance:
            distance._apply(keep)
        for moments in self.optimizer.state.values() if self.optimizer is not None else ():
            moments.update({k: keep(v) for k, v in moments.items() if torch.is_tensor(v) and k != "step"})
        self._recorded = {}
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_to_gt": None, "_recorded": {}}

    def extra_repr(self) -> str:
        """The main options, for ``print(tlw)``."""
        return f"base={self.base}, k={self.k_start}…{self.k_end}, every={self.weight_interval}"


def fold_frames(sr: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
    """Return images (N, C, H, W) as they are, and videos (N, T, C, H, W) with their frames as samples.

    Raises:
        ValueError: the shapes are others, there is no pixel, or the numbers are whole.
    """
    if sr.shape != gt.shape or sr.ndim not in (4, 5) or not sr.numel():
        shapes = f"{tuple(sr.shape)} and {tuple(gt.shape)}"
        raise ValueError(f"TLW: sr and gt must both be (N, C, H, W) or (N, T, C, H, W), got {shapes}")
    if not sr.is_floating_point() or not gt.is_floating_point():
        raise ValueError(f"TLW: sr and gt must be floating-point images in [0, 1], got {sr.dtype} and {gt.dtype}")
    return (sr, gt) if sr.ndim == 4 else (sr.flatten(0, 1), gt.flatten(0, 1))
