"""An optimiser with what a training adds to its step: a guard, accumulation, clipping and the scale of fp16."""

from typing import Any

from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from tlw_basicsr.models.guard import StepGuard, list_parameters


class TrainingOptimizer(Optimizer):
    """Takes the place of ``inner``, whose parameters, state and hooks it has.

    Args:
        inner: the optimiser.
        guard: may refuse a step.
        precision: unscales the gradients and takes the step.
        every: ``step()`` steps in every ``every``-th call only, on the mean of the gradients since the last.
        limit: largest norm of the gradient.

    Attributes:
        accumulated: gradients in the sum that the parameters' ``grad`` is between two iterations.
    """

    def __init__(
        self,
        inner: Optimizer,
        guard: StepGuard,
        precision: Any,
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
        """As torch's; the sum of an accumulation is put aside until the next ``step()``."""
        if not self.accumulated:
            self.inner.zero_grad(set_to_none)
        elif self.sums is None:
            parameters = list_parameters(self)
            self.sums = [p.grad for p in parameters]
            for p in parameters:
                p.grad = None

    def step(self, closure: Any = None) -> None:
        """Add the gradients to the sum and, where a step is due, take it; neither if the guard refuses."""
        self.precision.unscale(self.inner)
        if not self.guard.allows(self):
            return
        self.before = self.accumulated, self.sums
        parameters = list_parameters(self)
        for p, total in zip(parameters, self.sums or (), strict=False):
            if total is not None:
                p.grad = total if p.grad is None else total + p.grad
        self.sums = None
        self.accumulated = (self.accumulated + 1) % self.every
        if self.accumulated:
            return
        if self.every > 1:
            for p in parameters:
                if p.grad is not None:
                    p.grad.div_(self.every)
        if self.limit:
            clip_grad_norm_(parameters, self.limit)
        self.precision.take_step(self.inner, closure)

    def forget_iteration(self) -> None:
        """Let the sum be as it was before the iteration; without one, there are no gradients."""
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
        """Of ``inner``."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of ``inner``."""
        self.inner.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """To ``inner``."""
        self.inner.add_param_group(param_group)
