"""A training step in which a number is not finite leaves no trace."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

Group = tuple[torch.device, torch.dtype]


class Snapshot:
    """Copies of what a training step may change, to undo it: networks, optimisers' states and gradients they keep.

    The memory of the copies is used again, and they are made by device and type at once.
    """

    def __init__(self) -> None:
        self.tensors: dict[Group, list[Tensor]] = {}
        self.copies: dict[Group, list[Tensor]] = {}
        self.values: list[tuple[Optimizer, dict[Tensor, dict[str, Any]]]] = []
        self.kept: list[tuple[Optimizer, int, list[Tensor | None]]] = []

    @torch.no_grad()
    def take(self, networks: Iterable[nn.Module], optimizers: Iterable[Optimizer]) -> None:
        """Copy everything."""
        optimizers = list(optimizers)
        parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        states = [state for o in optimizers for state in o.state.values()]
        tensors = [v for state in states for v in state.values() if torch.is_tensor(v)]
        tensors += chain(parameters, *(net.parameters() for net in networks), *(net.buffers() for net in networks))
        groups: dict[Group, dict[int, Tensor]] = defaultdict(dict)
        for tensor in tensors:
            groups[tensor.device, tensor.dtype][id(tensor)] = tensor.detach()
        self.tensors = {group: list(members.values()) for group, members in groups.items()}
        for group, members in self.tensors.items():
            copies = self.copies.get(group, [])
            if [t.shape for t in members] != [c.shape for c in copies]:
                self.copies[group] = copies = [torch.empty_like(t) for t in members]
            torch._foreach_copy_(copies, members)
        # what an optimiser holds for a parameter: tensors, whose values are copied above, and plain values
        self.values = [(o, {p: dict(state) for p, state in o.state.items()}) for o in optimizers]
        self.kept = []
        for o in optimizers:
            if count := getattr(o, "accumulated", 0):
                gradients = [p.grad for group in o.param_groups for p in group["params"]]
                self.kept.append((o, count, [None if g is None else g.clone() for g in gradients]))

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for group, members in self.tensors.items():
            torch._foreach_copy_(members, self.copies[group])
        for optimizer, state in self.values:
            for p in list(optimizer.state):
                if p not in state:
                    del optimizer.state[p]
            for p, values in state.items():
                optimizer.state[p] = values
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None
            if hasattr(optimizer, "accumulated"):
                optimizer.accumulated = 0
        for optimizer, count, gradients in self.kept:
            optimizer.accumulated = count
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient


class StepGuard:
    """Whether a training step was finite, of which everything is noted as a flag on the device and read once.

    A finite step is left as it is; another one is undone by a :class:`Snapshot`: networks with their buffers, EMA,
    optimisers' states, and the gradients that an optimiser keeps for a later step.

    Attributes:
        skipped: steps undone so far.
        in_row: of these, those since the last finite one.
    """

    def __init__(self) -> None:
        self.skipped = self.in_row = 0
        self.flags: dict[str, Tensor] = {}
        self.snapshot = Snapshot()

    def begin(self, networks: Iterable[nn.Module], optimizers: Iterable[Optimizer]) -> None:
        """Remember everything before a step."""
        self.flags = {}
        self.snapshot.take(networks, optimizers)

    @torch.no_grad()
    def note(self, term: str, value: Any) -> None:
        """Note whether a tensor is finite; anything else, and a term that is noted already, is left out."""
        if term not in self.flags and torch.is_tensor(value) and value.is_floating_point():
            self.flags[term] = torch.isfinite(value).all()

    @torch.no_grad()
    def note_norm(self, term: str, tensors: Iterable[Tensor | None]) -> None:
        """Note whether many tensors are finite, and their squares with them, by their norm; once for a term."""
        if term in self.flags:
            return
        tensors = [t.detach() for t in tensors if t is not None and t.is_floating_point()]
        if tensors:
            self.flags[term] = torch.isfinite(get_total_norm(tensors))

    def note_losses(self, losses: dict[str, Any]) -> None:
        """Note numbers that are on the host already, where they are not finite."""
        for name, value in losses.items():
            if isinstance(value, float) and not math.isfinite(value):
                self.flags[name] = torch.tensor(False)

    def not_finite(self, agree: Callable[[Tensor], Tensor]) -> tuple[bool, list[str]]:
        """Read all flags, with one wait for the device.

        Args:
            agree: gives the flag that all processes agree on.

        Returns:
            Whether some process has a number that is not finite, and the terms of this process in the order in which
            they were noted.
        """
        device = next(iter(self.flags.values())).device
        flags = torch.stack([flag.to(device) for flag in self.flags.values()])
        if torch.cat([flags, agree(flags.all())[None]]).all():
            return False, []
        return True, [term for term, fine in zip(self.flags, flags.tolist(), strict=True) if not fine]

    def undo(self) -> None:
        """Undo the step, and count it."""
        self.snapshot.restore()
        self.skipped += 1
        self.in_row += 1

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"skipped": self.skipped, "in_row": self.in_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Undo :meth:`state_dict`; an empty state changes nothing."""
        self.skipped, self.in_row = state.get("skipped", self.skipped), state.get("in_row", self.in_row)
