"""Refuses a training step in which a number is not finite, before it is taken, and undoes what led to it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tlw_basicsr.core.graphs import copy_all, list_buffers

LARGEST = 1e18  # norm of a gradient whose square, which Adam keeps, fits into float32


class StepGuard:
    """Looks at everything that a step is made of, on the device, before an optimiser takes it.

    It looks at the model's images, the losses, the gradient's norm with the learning rate, and the networks' buffers;
    one flag is read for a step, as a ``GradScaler`` does. Once a step is refused, no later one of that iteration is
    taken, and what has changed before is put back: the buffers, which are copied at its start, and the steps of
    optimisers that others follow (the weighting network's, a GAN generator's), which are copied before they step. The
    last optimiser of an iteration (that of θ in SRModel and TLWModel) is not copied, once it is known to be the last.

    Args:
        agree: returns the flag that all processes agree on.
        enabled: whether it looks at all.

    Attributes:
        losses: those of this iteration; the model adds them.
        refused: whether a step of this iteration has been refused.
        skipped: the number of iterations refused so far.
        in_row: how many of these came since the last finite one.
    """

    def __init__(self, agree: Callable[[Tensor], Tensor], enabled: bool = True) -> None:
        self.agree, self.enabled = agree, enabled
        self.active = self.refused = False
        self.skipped = self.in_row = 0
        self.losses: list[Tensor] = []
        self.places: list[tuple[dict[str, Tensor], str]] | None = None  # of the buffers
        self.buffers: list[Tensor] = []
        self.buffer_copies: list[Tensor] = []
        self.looked_at: Callable[[], Iterable[Any]] = list
        self.copies: list[Snapshot] = []
        self.stepped: list[Optimizer] = []
        self.last: Optimizer | None = None

    @contextmanager
    def iteration(self, networks: Iterable[nn.Module], looked_at: Callable[[], Iterable[Any]]) -> Iterator[None]:
        """Guard the steps of one iteration, in which a forward of the ``networks`` changes their buffers.

        ``looked_at`` returns what must be finite for a step; other values than tensors in it are left out.
        """
        self.active, self.refused = self.enabled, False
        self.losses, self.copies, self.stepped, self.looked_at = [], [], [], looked_at
        if self.active:
            self._copy_buffers(networks)
        try:
            yield
        finally:
            self.active = False
            self.losses, self.looked_at = [], list
            if self.stepped:
                self.last = self.stepped[-1]

    @torch.no_grad()
    def _copy_buffers(self, networks: Iterable[nn.Module]) -> None:
        if self.places is None:  # without those that are not finite: a mask may hold -inf
            self.places = [(owner, name) for owner, name in list_buffers(networks) if is_sound([owner[name]])]
        self.buffers = self.list_buffers()
        if [buffer.shape for buffer in self.buffers] != [copy.shape for copy in self.buffer_copies]:
            self.buffer_copies = [buffer.clone() for buffer in self.buffers]
        elif self.buffers:
            copy_all(self.buffer_copies, self.buffers)

    def list_buffers(self, net: nn.Module | None = None) -> list[Tensor]:
        """Return the buffers that must be finite, all or those of a network; a forward may have replaced them."""
        owners = None if net is None else {id(module._buffers) for module in net.modules()}
        return [owner[name] for owner, name in self.places or () if owners is None or id(owner) in owners]

    @torch.no_grad()
    def allows(self, optimizer: Optimizer) -> bool:
        """Return whether ``optimizer`` may step with the gradients it has; waits for the device once."""
        if not self.active:
            return True
        if not self.refused:
            values = [*self.losses, *self.looked_at(), *self.list_buffers()]
            self.refused = not self.agree(is_sound(values, optimizer)).item()
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
        if self.places:
            copy_all(self.buffers, self.buffer_copies)
        for (owner, name), buffer in zip(self.places or (), self.buffers, strict=True):
            owner[name] = buffer
        for optimizer in optimizers:
            optimizer.forget_iteration()
        self.skipped += 1
        self.in_row += 1

    def state_dict(self) -> dict[str, int]:
        """Return the counts."""
        return {"skipped": self.skipped, "in_row": self.in_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Set the counts that :meth:`state_dict` has returned; an empty state changes nothing."""
        self.skipped, self.in_row = int(state.get("skipped", self.skipped)), int(state.get("in_row", self.in_row))


class Snapshot:
    """Copies of an optimiser's parameters and of what it holds for them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.state = {p: dict(state) for p, state in optimizer.state.items()}
        held = [value for state in self.state.values() for value in state.values() if torch.is_tensor(value)]
        self.tensors = [t.detach() for t in [*list_parameters(optimizer), *held]]
        self.copies = [torch.empty_like(tensor) for tensor in self.tensors]
        copy_all(self.copies, self.tensors)

    def restore(self) -> None:
        """Put everything back."""
        copy_all(self.tensors, self.copies)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)


def list_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Return all parameters of an optimiser."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def is_sound(values: Iterable[Any], optimizer: Optimizer | None = None) -> Tensor:
    """Return a flag: whether all floating-point tensors among ``values`` are finite, in eight launches.

    Gradient and learning rate of ``optimizer`` must be so small that no step of theirs leaves float32.
    """
    tensors = [v.detach() for v in values if torch.is_tensor(v) and v.is_floating_point() and v.numel()]
    parameters = [] if optimizer is None else list_parameters(optimizer)
    norms = list_norms([p.grad for p in parameters if p.grad is not None], 2)
    count = len(norms)
    norms += list_norms(tensors, torch.inf)  # the largest magnitude, NaN where one value is
    if not norms:
        return torch.tensor(True)
    joined = torch.stack([norm.to(norms[0].device) for norm in norms])
    flags = []
    if optimizer is not None and count:
        largest = max((float(group["lr"]) for group in optimizer.param_groups), default=0.0)
        flags.append(torch.linalg.vector_norm(joined[:count]) < LARGEST / max(1.0, 1e3 * largest))
    if tensors:
        flags.append(joined[count:].amax() < torch.inf)
    return flags[0] & flags[-1]


def list_norms(tensors: list[Tensor], kind: float) -> list[Tensor]:
    """Return the norm of each tensor, in an order of its own."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return [norm for group in groups.values() for norm in torch._foreach_norm(group, kind)]  # pyright: ignore[reportPrivateImportUsage]
