"""A training step in which a number is not finite is refused before it is taken, and leaves no trace."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

LARGEST = 1e18  # of a gradient's norm: its square has to fit into float32, as Adam keeps it


class StepGuard:
    """Looks at everything that a step is made of, on the device, before an optimiser takes it.

    These are the model's images, the losses whose gradient is taken, the gradient's norm with the learning rate, and
    the networks' buffers; one flag is read for a step, as a ``GradScaler`` does. In an iteration in which a step is
    refused no later one is taken, and what has changed before is put back: the buffers, of which there is a copy, and
    the steps of optimisers that others follow (the weighting network's, a GAN's generator's), which are copied before
    they step. The last one of an iteration, of SRModel and TLWModel that of θ, is not, once it is known to be that.

    Args:
        agree: gives the flag that all processes agree on.

    Attributes:
        enabled: whether it looks at all; without it, only at the gradients of a scaled loss.
        refused: whether a step of this iteration has been refused.
        skipped: iterations refused so far.
        in_row: of these, those since the last finite one.
    """

    def __init__(self, agree: Callable[[Tensor], Tensor], enabled: bool = True) -> None:
        self.agree, self.enabled = agree, enabled
        self.active = self.refused = False
        self.skipped = self.in_row = 0
        self.losses: list[Tensor] = []
        self.buffers: list[tuple[Tensor, Tensor]] | None = None
        self.looked_at: Callable[[], Iterable[Any]] = list
        self.copies: list[Snapshot] = []
        self.stepped: list[Optimizer] = []
        self.last: Optimizer | None = None

    @contextmanager
    def iteration(self, networks: Iterable[nn.Module], looked_at: Callable[[], Iterable[Any]]) -> Iterator[None]:
        """The context of one iteration.

        Args:
            networks: of the model, whose buffers a forward changes.
            looked_at: gives the tensors that must be finite for a step; other values in it are left out.
        """
        self.active, self.refused = self.enabled, False
        self.losses, self.copies, self.stepped, self.looked_at = [], [], [], looked_at
        if self.active:
            self._copy_buffers(networks)
        try:
            with watch_backward(self.losses.append):
                yield
        finally:
            self.active = False
            self.losses, self.looked_at = [], list
            if self.stepped:
                self.last = self.stepped[-1]

    @torch.no_grad()
    def _copy_buffers(self, networks: Iterable[nn.Module]) -> None:
        if self.buffers is None:
            found = {id(b): b for net in networks for b in net.buffers() if are_finite([b])}  # a mask may hold -inf
            self.buffers = [(buffer, buffer.clone()) for buffer in found.values()]
        elif self.buffers:
            for buffer, copy in self.buffers:
                copy.copy_(buffer)

    @torch.no_grad()
    def allows(self, optimizer: Optimizer) -> bool:
        """Whether ``optimizer`` may take its step with the gradients that there are; one wait for the device."""
        if not self.active:
            return True
        if not self.refused:
            flags = [is_small(optimizer), are_finite(self.losses), are_finite(self.looked_at())]
            flags.append(are_finite(buffer for buffer, _ in self.buffers or ()))
            self.refused = not self.agree(torch.stack([f.to(flags[0].device) for f in flags]).all()).item()
        if self.refused:
            return False
        self.stepped.append(optimizer)
        if optimizer is not self.last:
            self.copies.append(Snapshot(optimizer))
        return True

    @torch.no_grad()
    def undo(self, optimizers: Iterable[Any]) -> None:
        """Put back what a refused iteration has changed, and count it."""
        for copy in reversed(self.copies):
            copy.restore()
        for buffer, copy in self.buffers or ():
            buffer.copy_(copy)
        for optimizer in optimizers:
            optimizer.forget_iteration()
        self.skipped += 1
        self.in_row += 1

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"skipped": self.skipped, "in_row": self.in_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Undo :meth:`state_dict`; an empty state changes nothing."""
        self.skipped, self.in_row = state.get("skipped", self.skipped), state.get("in_row", self.in_row)


class Snapshot:
    """Copies of an optimiser's parameters and of what it holds for them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.state = {p: dict(state) for p, state in optimizer.state.items()}
        held = [value for state in self.state.values() for value in state.values() if torch.is_tensor(value)]
        self.tensors = [t.detach() for t in [*list_parameters(optimizer), *held]]
        self.copies = [tensor.clone() for tensor in self.tensors]

    def restore(self) -> None:
        """Put everything back."""
        for tensor, copy in zip(self.tensors, self.copies, strict=True):
            tensor.copy_(copy)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)


def list_parameters(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimiser."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def are_finite(values: Iterable[Any]) -> Tensor:
    """A flag: whether all floating-point tensors among ``values`` are finite."""
    tensors = [value.detach() for value in values if torch.is_tensor(value) and value.is_floating_point()]
    if not tensors:
        return torch.tensor(True)
    return torch.stack([torch.isfinite(t).all().to(tensors[0].device) for t in tensors]).all()


def is_small(optimizer: Optimizer) -> Tensor:
    """A flag: whether the gradient and the learning rate are so small that no step of theirs leaves float32."""
    gradients = [p.grad for p in list_parameters(optimizer) if p.grad is not None]
    largest = max((float(group["lr"]) for group in optimizer.param_groups), default=0.0)
    if not gradients:
        return torch.tensor(True)
    return get_total_norm(gradients) < LARGEST / max(1.0, 1e3 * largest)


@contextmanager
def watch_backward(watch: Callable[[Tensor], Any]) -> Iterator[None]:
    """Within it, ``watch`` sees every tensor whose ``backward()`` is called, as BasicSR's models do with their losses.

    What it returns takes the tensor's place, unless that is None.
    """
    plain = Tensor.backward

    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        changed = watch(loss)
        plain(loss if changed is None else changed, *args, **kwargs)

    Tensor.backward = backward  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.backward = plain  # type: ignore[method-assign]
