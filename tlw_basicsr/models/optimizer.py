"""An optimiser with what a training adds to its step: the guard, accumulation, clipping and fp16's loss scale."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from tlw_basicsr.models.guard import StepGuard, list_parameters


class TrainingOptimizer(Optimizer):
    """Takes the place of ``inner``, whose parameters, state and hooks it has.

    Only every ``every``-th call of ``step()`` steps, on the mean of the gradients since the last one, whose norm is at
    most ``limit``; if the ``guard`` allows it.

    Attributes:
        accumulated: the number of gradients whose sum the parameters' ``grad`` is between two iterations.
    """

    def __init__(
        self,
        inner: Optimizer,
        guard: StepGuard,
        precision: "MixedPrecision",
        every: int = 1,
        limit: float | None = None,
    ) -> None:
        # torch's own constructor is not called: everything that it makes is inner's
        self.inner, self.guard, self.precision, self.every, self.limit = inner, guard, precision, every, limit
        self.accumulated = 0
        self.sums: list[Tensor | None] | None = None
        self.before: tuple[int, list[Tensor | None] | None] = 0, None

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __repr__(self) -> str:
        return repr(self.inner)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; the sum of an accumulation is put aside until the next ``step()``."""
        if not self.accumulated:
            self.inner.zero_grad(set_to_none)
        elif self.sums is None:
            parameters = list_parameters(self)
            self.sums = [p.grad for p in parameters]
            for p in parameters:
                p.grad = None

    def step(self, closure: Any = None) -> None:
        """Add the gradients to the sum and, where a step is due, take it; do neither if the guard refuses."""
        self.precision.unscale(self.inner)
        if not self.guard.allows(self):
            return
        self.before = self.accumulated, self.sums
        parameters = list_parameters(self)
        both = []
        for p, total in zip(parameters, self.sums or (), strict=False):
            if total is not None and p.grad is not None:
                both.append((p, total))
            elif total is not None:
                p.grad = total
        if both:
            sums = torch._foreach_add([total for _, total in both], [p.grad for p, _ in both])  # pyright: ignore[reportPrivateImportUsage]
            for (p, _), total in zip(both, sums, strict=True):
                p.grad = total
        self.sums = None
        self.accumulated = (self.accumulated + 1) % self.every
        if self.accumulated:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.every > 1 and gradients:
            torch._foreach_div_(gradients, self.every)  # pyright: ignore[reportPrivateImportUsage]
        if self.limit:
            clip_grad_norm_(parameters, self.limit)
        self.precision.take_step(self.inner, closure)

    def forget_iteration(self) -> None:
        """Set the sum back to what it was before the iteration; without a sum, clear the gradients."""
        if self in self.guard.stepped:
            self.accumulated, self.sums = self.before
        elif self.accumulated and self.sums is None:
            return  # it had no part in the iteration
        parameters = list_parameters(self)
        for p, total in zip(parameters, self.sums or [None] * len(parameters), strict=True):
            p.grad = total
        self.sums = None

    def forget_gradients(self) -> None:
        """Begin anew, without what is accumulated."""
        self.accumulated, self.sums = 0, None
        self.inner.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of ``inner``."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state into ``inner``."""
        self.inner.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to ``inner``."""
        self.inner.add_param_group(param_group)


class MixedPrecision:
    """Autocast around a model's training step, with a scaled loss for fp16.

    The :class:`StepGuard` refuses a step whose gradients overflow, and the scale falls. ``use_amp`` is ``'bf16'``,
    ``'fp16'``, or False for neither.
    """

    def __init__(self, device_type: str, use_amp: str | bool | None) -> None:
        self.device_type = device_type
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(use_amp))
        self.scaler = torch.amp.GradScaler(device_type, enabled=self.dtype == torch.float16)
        self.unscaled = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run one training step in this precision."""
        if self.dtype is None:
            yield
            return
        try:
            with ExitStack() as stack:
                # without a cache: weights change within a training step
                stack.enter_context(torch.autocast(self.device_type, self.dtype, cache_enabled=False))
                if self.scaler.is_enabled():
                    stack.enter_context(ScaledLosses(self.scaler))
                yield
        finally:
            if self.unscaled:
                self.scaler.update()
                self.unscaled = False

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, if the loss is scaled."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)
            self.unscaled = True

    def take_step(self, optimizer: Optimizer, closure: Any = None) -> None:
        """Step; if the loss is scaled, only with finite gradients, at which the guard may not have looked."""
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)
        else:
            optimizer.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scale."""
        return {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set what :meth:`state_dict` has returned; an empty state changes nothing."""
        if state.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


class ScaledLosses(TorchFunctionMode):
    """Within it, ``loss.backward()`` is that of the scaled loss.

    BasicSR's models call it in the middle of their ``optimize_parameters``, where nothing of ours stands between.
    """

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        super().__init__()
        self.scaler = scaler

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.backward:
            args = (self.scaler.scale(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))
