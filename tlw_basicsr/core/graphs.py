"""A loss with its gradient, recorded once and replayed: a CUDA graph, which the host launches as a single operation."""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Replay = Callable[[], object]
MOST_RECORDINGS = 4  # of one function; one whose shapes change more often is not worth them
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2"}  # operations whose result the host reads


def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy the values of tensors into others, with as few launches as there can be."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        ours, theirs = groups[target.dtype, source.dtype, target.device, source.device]
        ours.append(target)
        theirs.append(source)
    with torch.no_grad():
        for ours, theirs in groups.values():
            torch._foreach_copy_(ours, theirs)  # pyright: ignore[reportPrivateImportUsage]


def list_buffers(networks: Iterable[nn.Module]) -> list[tuple[dict[str, Tensor], str]]:
    """Return where the buffers of networks are kept, since a forward may put another tensor there."""
    modules = dict.fromkeys(module for net in networks for module in net.modules())
    buffers: list[tuple[Any, str]] = [(module._buffers, name) for module in modules for name in module._buffers]
    return [(owner, name) for owner, name in buffers if owner[name] is not None]


def record_cuda(function: Callable[[], Any]) -> tuple[Any, Replay]:
    """Record ``function`` as a CUDA graph; return its results, which each replay overwrites, and the replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries allocate and choose their kernels in the first calls
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a thread that pins memory may go on
        results = function()
    return results, graph.replay


RECORDERS: dict[str, Callable[[Callable[[], Any]], tuple[Any, Replay]]] = {"cuda": record_cuda}
"""How a function is recorded, by the type of the device."""


class NoWaits(TorchDispatchMode):
    """Within it, an operation that the host waits for is a RuntimeError: it can't be recorded."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        places = args[1] if name in ("index", "index_put", "index_put_") else ()  # by a mask: how many there are
        if name in WAITS or any(torch.is_tensor(place) and place.dtype == torch.bool for place in places):
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


class Held:
    """The gradients of a loss that has been handed out."""

    def __init__(self, gradients: Sequence[Tensor | None]) -> None:
        self.gradients = gradients


class GiveGradients(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, held: Held, *_: Tensor) -> Tensor:
        """The loss; further arguments are the tensors that the gradients belong to."""
        ctx.held = held
        return loss.view_as(loss)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, times that of the loss."""
        known = [g for g in ctx.held.gradients if g is not None]
        scaled = iter(torch._foreach_mul(known, upstream[0]))  # pyright: ignore[reportPrivateImportUsage]
        return (None, None, *(None if g is None else next(scaled) for g in ctx.held.gradients))


class RecordedLoss:
    """``loss, *others = function(*inputs)``, recorded together with the gradient of the loss.

    Inputs are tensors, numbers above 0, which the recorded function gets as 0-dim float64 tensors, and None. The
    gradient goes to the inputs that require one; if none does, to the ``modules``' parameters. It is recorded when
    inputs of the same shapes come for the second time in a row. The function itself is called for others, where modules
    have hooks, are compiled or wait for other processes, and where a recording has failed.

    ``others`` are overwritten by the next call. A loss keeps its gradient as long as it lives.

    Args:
        function: returns a scalar loss and further tensors; it draws no random numbers, and what it keeps between calls
            are its modules' buffers.
        modules: returns the modules that it computes with.

    Attributes:
        failure: why nothing is recorded any more, or None.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], modules: Callable[[], Iterable[nn.Module]]) -> None:
        self.function, self.modules = function, modules
        self.failure: str | None = None
        self.recordings = 0
        self.key: Any = None
        self.last_key: Any = None
        self.replay: Replay = lambda: None
        self.pending: Callable[[], Held | None] = lambda: None

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        """As ``function``."""
        key = None if self.failure else self._describe(inputs)
        if key is None:
            return self.function(*inputs)
        if key != self.key:
            again, self.last_key = key == self.last_key, key
            if not again or not self._record(inputs, key):
                return self.function(*inputs)
        self.last_key = key
        if held := self.pending():
            held.gradients = [g if g is None else g.clone() for g in held.gradients]
        self._fill(inputs)
        self.replay()
        loss, gradients, others = self.results
        held = Held(gradients)
        self.pending = weakref.ref(held)
        return GiveGradients.apply(loss, held, *self._list_leaves(inputs)), *others

    def _describe(self, inputs: Sequence[Any]) -> Any:
        """All that a recording depends on besides values, or None where it can't be trusted."""
        parts: list[Any] = []
        for value in inputs:
            if torch.is_tensor(value):
                last = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
                parts += [value.shape, value.dtype, value.device, value.requires_grad, last]
            else:
                parts.append(type(value))
        kind = next(value.device.type for value in inputs if torch.is_tensor(value))
        parts += [torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)]
        for module in self._list_modules():
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._compiled_call_impl is not None
                or isinstance(module, nn.SyncBatchNorm)
            ):
                return None
            parts.append(module.training)
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                parts += [] if tensor is None else [tensor.data_ptr(), tensor.requires_grad]
        return parts

    def _list_modules(self) -> Iterator[nn.Module]:
        return (module for top in self.modules() for module in top.modules())

    def _list_leaves(self, inputs: Iterable[Any]) -> list[Tensor]:
        given = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
        return given or [p for top in self.modules() for p in top.parameters() if p.requires_grad]

    def _record(self, inputs: Sequence[Any], key: Any) -> bool:
        """Record the function for inputs like these; return whether that was possible."""
        self.key, self.recordings = None, self.recordings + 1
        if self.recordings > MOST_RECORDINGS:
            self.failure = "the shapes of the batches keep changing"
            return False
        device = next(value.device for value in inputs if torch.is_tensor(value))
        self.inputs: list[Any] = [
            torch.empty_like(value, requires_grad=value.requires_grad)
            if torch.is_tensor(value)
            else value and torch.empty((), dtype=torch.float64, device=device)
            for value in inputs
        ]
        self.numbers: list[Any] = [None] * len(inputs)
        self._fill(inputs)
        buffers = [buffer for top in self.modules() for buffer in top.buffers()]
        before = [buffer.clone() for buffer in buffers]
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                with NoWaits():
                    self._compute()
                self.results, self.replay = RECORDERS[device.type](self._compute)
        except Exception as error:  # of a module of others, which raises what it likes, or of the device
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            return False
        finally:
            copy_all(buffers, before)
        self.key = key
        return True

    def _fill(self, inputs: Sequence[Any]) -> None:
        """Give the recorded function other inputs."""
        pairs = []
        for place, (target, value) in enumerate(zip(self.inputs, inputs, strict=True)):
            if torch.is_tensor(value):
                pairs.append((target, value.detach()))
            elif value is not None and value != self.numbers[place]:
                target.fill_(value)
                self.numbers[place] = value
        copy_all(*zip(*pairs, strict=True))

    def _compute(self) -> tuple[Tensor, tuple[Tensor | None, ...], list[Tensor]]:
        with torch.enable_grad():
            loss, *others = self.function(*self.inputs)
            gradients = torch.autograd.grad(loss, self._list_leaves(self.inputs), allow_unused=True)
        return loss.detach(), gradients, [other.detach() for other in others]
