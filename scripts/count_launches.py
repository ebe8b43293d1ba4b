"""What an iteration asks of a GPU, counted without one: launches, waits of the host and uploads, by part.

The model of a YAML is built on torch's ``meta`` device, which computes nothing, and trained for some iterations. Every
operation that writes memory of the device counts as one launch, a convolution with bias as two, an operation on a list
of tensors as one for 110 of them, and the replay of a graph as one. A wait is a value that the host reads, an upload a
tensor that it sends, the batch left out. The counts are the same on every machine.

  python scripts/count_launches.py options/recipes/recipe_EDSR_x4.yml --batch 16 --patch 192
  python scripts/count_launches.py options/recipes/*.yml --no-graphs
"""

import argparse
import importlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import tlw_basicsr  # noqa: F401  comes first, see its compat.py

# isort: split

import torch
from basicsr.models.base_model import BaseModel
from torch import Tensor, nn
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tlw_basicsr.core.graphs import RECORDERS
from tlw_basicsr.engine.options import read_options
from tlw_basicsr.models import TLWMixin, build_model
from tlw_basicsr.tools.report import markdown_table
from tlw_basicsr.util.errors import run

A_LIST = 110  # tensors of a list that one launch takes
PARTS = ("forward", "loss", "backward", "optimiser", "M step", "E step", "guard", "EMA", "other")
KINDS = ("launches", "waits", "uploads")
aten = torch.ops.aten
NO_LAUNCH = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


class Counted(TorchDispatchMode):
    """Counts what the operations within it ask of the device ``meta``, by part and by ``launches, waits, uploads``."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.counts = "other", defaultdict(Counter)

    def add(self, kind: str, number: int = 1) -> None:
        """Count ``number`` of ``kind`` in the present part."""
        self.counts[self.part][kind] += number

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Let what follows belong to ``part``, but within an E step only the guard's share."""
        before = self.part
        self.part = part if before != "E step" or part == "guard" else before
        try:
            yield
        finally:
            self.part = before

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Let a method of an object, and what it calls, belong to ``part``."""
        method = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.within(part):
                return method(*args, **kwargs)

        setattr(owner, name, call)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        meta = any(x.is_meta for x in given)
        name = func.overloadpacket
        if meta and (name is aten._local_scalar_dense or str(kwargs.get("device")) == "cpu"):
            self.add("waits")
            return 0.5 if name is aten._local_scalar_dense else torch.full(args[0].shape, 0.5, dtype=args[0].dtype)
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.is_meta]
        if not meta and not made:
            return result
        returns = func._schema.returns
        view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if view or name in NO_LAUNCH:
            return result
        if (name is aten._to_copy and not meta) or (name is aten.copy_ and not args[1].is_meta):
            self.add("uploads")
        self.add("launches", count_launches(func, args, result))
        return result


def count_launches(func: Any, args: tuple, result: Any) -> int:
    """Launches of an operation that writes memory of the device."""
    name = func.overloadpacket
    if name is aten.convolution:
        return 1 + (args[2] is not None)
    if name is aten.convolution_backward:
        return sum(part is not None for part in result)
    if name.__name__.startswith("_foreach"):
        same = len({(x.dtype, x.device) for x in args[0]}) == 1
        return -(-len(args[0]) // A_LIST) if same else len(args[0])
    return 1


def build(opt: dict[str, Any]) -> Any:
    """The model of a YAML's options on ``meta``, with torch's defaults of a GPU."""
    distance = (opt["train"].get("pixel_opt") or {}).get("distance")
    if distance and distance["type"] == "LPIPSDistance":
        distance["weights"] = "random"
    opt |= {"is_train": True, "dist": False, "rank": 0, "world_size": 1, "num_gpu": 0}
    opt["path"] |= {"models": "", "training_states": "", **dict.fromkeys(k for k in opt["path"] if "pretrain" in k)}
    model = build_model(opt)
    if isinstance(model, TLWMixin):
        model.set_epoch(0)
    return model


def mark_parts(model: Any, counted: Counted) -> None:
    """Let the counts of a model's iteration go to the parts that cause them."""
    counted.wrap(model.net_g, "forward", "forward")
    counted.wrap(model, "model_ema", "EMA")
    counted.wrap(model.guard, "allows", "guard")
    counted.wrap(model.guard, "_copy_buffers", "guard")
    for optimizer in model.optimizers:
        counted.wrap(optimizer, "step", "optimiser")
    if isinstance(model, TLWMixin):
        counted.wrap(model.tlw, "m_loss", "M step")
        counted.wrap(model.tlw, "e_step", "E step")
    elif isinstance(model.cri_pix, nn.Module):
        counted.wrap(model.cri_pix, "forward", "loss")


def count(opt: dict[str, Any], batch: int, patch: int, use_graphs: bool = True) -> dict[str, dict[str, float]]:
    """Count an iteration of the training of ``opt``: ``{part: {launches, waits, uploads}}``, ``all`` their sum.

    E steps are shared among the iterations from one to the next.

    Args:
        opt: the options of a YAML; they are changed.
        batch: images of a batch.
        patch: side of the HR images.
        use_graphs: record both steps of TLW as graphs, where ``train.tlw.use_graphs`` does not say otherwise.
    """
    counted = Counted()

    def record(function: Any) -> tuple[Any, Any]:
        return function(), lambda: counted.add("launches")

    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with counted.within("backward"):
            torch.autograd.backward(loss, *args, **kwargs)

    on_meta = property(lambda _: torch.device("meta"), lambda *_: None)
    devices = [*_foreach_utils._get_foreach_kernels_supported_devices(), "meta"]
    optimizer = importlib.import_module("torch.optim.optimizer")  # torch.optim deletes the name
    with (
        mock.patch.object(BaseModel, "device", on_meta, create=True),
        mock.patch.object(_foreach_utils, "_get_foreach_kernels_supported_devices", lambda: devices),
        mock.patch.object(optimizer, "_get_foreach_kernels_supported_devices", lambda: devices),
        mock.patch.object(Tensor, "backward", backward),
        mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()),  # which meta does not have
        mock.patch.object(torch, "is_autocast_enabled", lambda *_: False),
        mock.patch.object(torch, "get_autocast_dtype", lambda *_: torch.float32),
        mock.patch.dict(RECORDERS, {"meta": record} if use_graphs else {}),
        counted,
    ):
        model = build(opt)
        mark_parts(model, counted)
        period = model.tlw.weight_interval if isinstance(model, TLWMixin) else 1
        side = patch // opt["scale"]
        data = {"lq": torch.rand(batch, 3, side, side, device="meta")}
        data["gt"] = torch.rand(batch, 3, patch, patch, device="meta")
        for iteration in range(1, 4 * period + 5):  # those before the last are a warm-up
            if iteration == 3 * period + 5:
                counted.counts.clear()
            model.feed_data(data)
            model.optimize_parameters(iteration)
    rows = {part: {kind: counted.counts[part][kind] / period for kind in KINDS} for part in PARTS}
    return rows | {"all": {kind: sum(row[kind] for row in rows.values()) for kind in KINDS}}


def main() -> None:
    """Parse the arguments, count, print a table for each kind of count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("yaml", type=Path, nargs="+", help="options of a training")
    parser.add_argument("--batch", type=int, help="images of a batch, else the YAML's")
    parser.add_argument("--patch", type=int, help="side of the HR images, else the YAML's")
    parser.add_argument("--no-graphs", action="store_true", help="without CUDA graphs")
    args = parser.parse_args()
    rows = {}
    for yaml in args.yaml:
        opt = read_options(str(yaml))
        data = opt["datasets"]["train"]
        batch, patch = args.batch or data["batch_size_per_gpu"], args.patch or data["gt_size"] or 192
        rows[yaml.stem] = count(opt, batch, patch, not args.no_graphs)
    for kind in KINDS:
        cells = [[name, *(f"{row[part][kind]:.6g}" for part in [*PARTS, "all"])] for name, row in rows.items()]
        print("", *markdown_table([kind, *PARTS, "all"], cells, 1), sep="\n")


if __name__ == "__main__":
    run(main)
