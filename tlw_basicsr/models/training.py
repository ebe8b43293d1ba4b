"""What a training needs of any BasicSR model and BasicSR's own lacks: files written whole, states that hold all."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from basicsr.models.base_model import BaseModel
from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import master_only
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from tlw_basicsr.compat import CudaMeans
from tlw_basicsr.core.weight_net import paper_start_values
from tlw_basicsr.models import states
from tlw_basicsr.models.guard import StepGuard, are_finite, is_small, list_parameters, watch_backward
from tlw_basicsr.models.optimizer import TrainingOptimizer
from tlw_basicsr.models.optimizers import build_optimizer, build_schedulers
from tlw_basicsr.models.validation import validate_alone
from tlw_basicsr.networks import check_fit, describe_fit, read_network
from tlw_basicsr.util.errors import UserError
from tlw_basicsr.util.files import save_file


class TrainingMixin(BaseModel):
    """Checkpoints, devices and optimiser steps of a BasicSR model; goes before the model's own class.

    Options in ``train``, all off by default:

    - ``accumulation_steps``: iterations to a step of every optimiser;
    - ``clip_grad_norm``: the largest norm of an optimiser's gradient;
    - ``use_amp``: ``bf16`` or ``fp16``, see :class:`MixedPrecision`;
    - ``use_channels_last``: networks' weights in channels-last order;
    - ``use_compile``: ``torch.compile`` of the networks;
    - ``use_tf32``: TensorFloat-32 in matrix products;
    - ``init_g: paper``: weights of the SR network's convolutions start from N(0, 0.02), by ``manual_seed`` alone.

    ``val.save_best: METRIC`` keeps the networks that are best by this metric on the first validation set, as
    ``net_*_best.pth``.

    A step in which the input, the output, a loss, a weight, a gradient or a buffer is not finite is refused and logged,
    see :class:`tlw_basicsr.models.guard.StepGuard`; ``max_bad_steps`` (default 10) of them in a row end the training.
    ``guard: false`` turns that off.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        train = opt.get("train") or {}
        device = "cpu" if opt["num_gpu"] == 0 else "cuda"
        self.amp = MixedPrecision(device, train.get("use_amp") if opt["is_train"] else False)
        self.guard = StepGuard(self.agreed, train.get("guard", True))
        self.batch: dict[str, Any] = {}
        if train.get("use_tf32"):
            torch.set_float32_matmul_precision("high")
        with device_names(opt):
            super().__init__(opt)

    def feed_data(self, data: dict[str, Any]) -> None:
        """As the model's own, on its device."""
        # On the CPU `.to()` is no copy, and BasicSR's video validation squeezes the tensors that it has fed.
        self.batch = data = {k: value.detach() if torch.is_tensor(value) else value for k, value in data.items()}
        with device_names(self.opt):
            super().feed_data(data)

    def validation(self, dataloader: DataLoader, current_iter: int, *args: Any, **kwargs: Any) -> None:
        """As the model's own, on its device, by the bare network; the best networks are saved by the options.

        One process may validate alone, and a distributed network would wait for the others to share its buffers.
        """
        wrapped, self.net_g = self.net_g, self.get_bare_model(self.net_g)
        try:
            with device_names(self.opt), validate_alone(self, dataloader.dataset):
                super().validation(dataloader, current_iter, *args, **kwargs)
        finally:
            self.net_g = wrapped
        self.save_best(getattr(dataloader.dataset, "opt")["name"], current_iter)  # noqa: B009, a torch Dataset has none

    @master_only
    def save_best(self, dataset: str, current_iter: int) -> None:
        """Write ``net_*_best.pth`` if the metric ``val.save_best`` of the first validation set is the best so far."""
        metric = (self.opt.get("val") or {}).get("save_best")
        if not self.is_train or not metric:
            return
        first = next(options["name"] for options in self.opt["datasets"].values() if options["phase"] == "val")
        best = self.best_metric_results[first][metric] if dataset == first else {"iter": None}
        if best["iter"] == current_iter:
            self.save(-1, "best")

    own_optimizers = 0  # of a subclass, after those of the BasicSR model

    def get_optimizer(self, optim_type: str, params: Any, lr: float, **kwargs: Any) -> Optimizer:
        """The model's own, or torch's of the name."""
        try:
            return super().get_optimizer(optim_type, params, lr, **kwargs)
        except NotImplementedError:
            return build_optimizer(optim_type, params, lr=lr, **kwargs)

    def setup_optimizers(self) -> None:
        """The model's own, each within a :class:`TrainingOptimizer`."""
        super().setup_optimizers()
        train = self.opt["train"]
        every, limit = train.get("accumulation_steps", 1), train.get("clip_grad_norm")
        wrapped = {id(o): TrainingOptimizer(o, self.guard, self.amp, every, limit) for o in self.optimizers}
        self.optimizers: list[Any] = list(wrapped.values())
        for name, value in list(vars(self).items()):
            if id(value) in wrapped:
                setattr(self, name, wrapped[id(value)])

    def setup_schedulers(self) -> None:
        """The model's own, or torch's of the name in ``train.scheduler``."""
        section = dict(self.opt["train"]["scheduler"])  # of which BasicSR takes the type out
        try:
            super().setup_schedulers()
        except NotImplementedError:
            self.schedulers = build_schedulers(section, self.optimizers)

    def optimize_parameters(self, current_iter: int) -> None:
        """As the model's own, in mixed precision by the options; refused if it is not finite.

        Raises:
            UserError: ``train.max_bad_steps`` iterations in a row were not finite.
        """
        tlw, failed = getattr(self, "tlw", None), None
        last_e_step = tlw and tlw.last_e_step
        with self.guard.iteration(self.networks().values(), self.list_looked_at):
            try:
                with self.amp.step():
                    super().optimize_parameters(current_iter)
            except Exception as error:  # some losses check their input
                failed = error
        if failed and (self.opt["dist"] or not self.guard.enabled):
            raise failed  # the other processes may wait for this one in the middle of the step
        if not failed and not self.guard.refused:
            self.guard.in_row = 0
            return
        terms = self.name_not_finite(failed is None)
        if failed and not terms:
            raise failed
        self.guard.undo(self.optimizers)
        if tlw:
            tlw.last_e_step = last_e_step
        self.tell_bad_step(current_iter, terms)

    def list_looked_at(self) -> list[Any]:
        """What has to be finite for a step, beside losses, gradients and buffers."""
        return [getattr(self, name, None) for name in ("lq", "gt", "output")]

    def name_not_finite(self, logged: bool) -> list[str]:
        """The terms of the refused iteration that are not finite; of ``logged`` ones the losses too."""
        log = getattr(getattr(self, "tlw", None), "log", {})
        terms = {name: [getattr(self, name, None)] for name in ("lq", "gt", "output")}
        terms |= {"l_w": [log.get("l_w")], "weights w": [log.get("w")]}
        if logged:
            terms |= {n: [torch.tensor(float(v))] for n, v in self.log_dict.items() if n.startswith("l")}
        names = [name for name, values in terms.items() if not are_finite(values)]
        for number, optimizer in enumerate(self.optimizers):
            if not is_small(optimizer):
                name = next((k for k, v in vars(self).items() if v is optimizer), f"optimizer {number}")
                finite = are_finite(p.grad for p in list_parameters(optimizer))
                names.append(f"{'step' if finite else 'gradient'} of {name}")
        for name, net in self.networks().items():
            if not are_finite(net.buffers()):
                names.append(f"state of {name}")
        return names

    def networks(self) -> dict[str, nn.Module]:
        """``net_g``, ``net_g_ema`` and the others, by their names."""
        return {name: value for name, value in vars(self).items() if name[:3] == "net" and isinstance(value, nn.Module)}

    def agreed(self, flag: Tensor) -> Tensor:
        """``flag``, true only where it is true in every process."""
        if not self.opt["dist"]:
            return flag
        flag = flag.to(torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return flag.bool()

    def tell_bad_step(self, current_iter: int, terms: list[str]) -> None:
        """Log which terms of which images were not finite; at ``max_bad_steps`` in a row, keep the batch and stop.

        Raises:
            UserError: that many; the message names the file ``bad_step_{current_iter}.pth``.
        """
        values = [v for key, v in self.batch.items() if key.endswith("path") or key == "key"]
        paths = list(dict.fromkeys(p for v in values for p in (v if isinstance(v, (list, tuple)) else [v])))
        told = [(terms, paths)]
        if self.opt["dist"]:
            told = [None] * self.opt["world_size"]
            dist.all_gather_object(told, (terms, paths))
        told = [(names, images) for names, images in told if names]
        text = "; ".join(f"{', '.join(names)} (images {', '.join(map(str, images))})" for names, images in told)
        limit = self.opt["train"].get("max_bad_steps", 10)
        get_root_logger().warning(
            f"Iteration {current_iter:,}: not finite: {text}. The step is left out, {self.guard.in_row} in a row "
            f"(train.max_bad_steps: {limit})."
        )
        if self.guard.in_row < limit:
            return
        rank = self.opt.get("rank", 0)
        folder = Path(self.opt["path"].get("experiments_root", self.opt["path"]["models"]))
        path = folder / f"bad_step_{current_iter}{f'_{rank}' if rank else ''}.pth"
        networks = {name: net.state_dict() for name, net in self.networks().items()}
        save_file({"iter": current_iter, "terms": terms, "paths": paths, "batch": self.batch, **networks}, path)
        raise UserError(
            f"train.max_bad_steps: {self.guard.in_row} iterations in a row were not finite, the last one "
            f"{current_iter:,}: {text}; its batch and the networks before it are in {path}"
        )

    def get_current_log(self) -> OrderedDict[str, float]:
        """The model's own, and the number of steps that were left out: where there are any, and in mixed precision."""
        log = OrderedDict(super().get_current_log())
        if self.guard.skipped or self.amp.dtype is not None:
            log["skipped"] = self.guard.skipped
        return log

    def model_ema(self, decay: float = 0.999) -> None:
        """BasicSR's, but not in iterations that are refused or only add to the gradient."""
        if decay == 0 or not (self.guard.refused or getattr(self.optimizers[0], "accumulated", 0)):
            super().model_ema(decay)

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """As BasicSR's, with ``use_channels_last`` and ``use_compile``; distributed on CPU processes too."""
        train = (self.opt.get("train") or {}) if self.is_train else {}
        if train.get("init_g") == "paper" and net is getattr(self, "net_g", None):
            generator = torch.Generator().manual_seed(self.opt["manual_seed"])
            net.apply(partial(paper_start_values, generator=generator))
        if train.get("use_channels_last"):
            channels_last(net)
        if train.get("use_compile"):
            net.compile()
        if self.opt["dist"] and self.device.type == "cpu":
            unused = self.opt.get("find_unused_parameters", False)
            return DistributedDataParallel(net, find_unused_parameters=unused)
        return super().model_to_device(net)

    @master_only
    def save_network(
        self,
        net: nn.Module | list[nn.Module],
        net_label: str,
        current_iter: int,
        param_key: str | list[str] = "params",
    ) -> None:
        """Write ``{net_label}_{current_iter}.pth`` in BasicSR's format, whole or not at all (-1 is ``latest``)."""
        nets = net if isinstance(net, list) else [net]
        keys = param_key if isinstance(param_key, list) else [param_key]
        content = {
            key: {name: tensor.detach().cpu() for name, tensor in self.get_bare_model(one).state_dict().items()}
            for key, one in zip(keys, nets, strict=True)
        }
        label = "latest" if current_iter == -1 else current_iter
        save_file(content, Path(self.opt["path"]["models"], f"{net_label}_{label}.pth"))

    def load_network(
        self, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = "params"
    ) -> None:
        """Load a network in BasicSR's format.

        Raises:
            UserError: the file is missing, damaged, or of another network.
        """
        net = self.get_bare_model(net)
        what = "pretrained network"
        state = read_network(load_path, param_key, what)
        check_fit(state, net, strict, load_path, what)
        if not strict:
            get_root_logger().warning(f"strict_load: false, {load_path}: {describe_fit(state, net)}")
            own = net.state_dict()
            state = {name: v for name, v in state.items() if name in own and own[name].shape == v.shape}
        get_root_logger().info(f"Loading {type(net).__name__} from {load_path}, param key [{param_key}].")
        net.load_state_dict(state, strict=strict)

    def training_state(self) -> dict[str, Any]:
        """What a resumed training needs beside the networks, optimisers and schedulers; called by every process."""
        return states.collect_state(self)

    def save_training_state(self, epoch: int, current_iter: int | str) -> None:
        """Write ``{current_iter}.state``; nothing at -1 or ``best``."""
        states.write_state(self, epoch, current_iter)

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Load optimisers and schedulers, the best metrics so far and this process's random numbers.

        Raises:
            UserError: the state is damaged, or of a training with other optimisers.
        """
        states.take_state(self, resume_state, super().resume_training)

    def resume_rest(self, resume_state: dict[str, Any]) -> None:
        """What BasicSR's states do not hold."""
        states.take_rest(self, resume_state)


class MixedPrecision:
    """Autocast around a model's training step, and the loss scaled for fp16.

    A step whose gradients overflow is refused by the :class:`StepGuard`; the scale falls.

    Args:
        device_type: ``'cpu'`` or ``'cuda'``.
        use_amp: ``'bf16'``, ``'fp16'`` or False, which does nothing.
    """

    def __init__(self, device_type: str, use_amp: str | bool | None) -> None:
        self.device_type = device_type
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(use_amp))
        self.scaler = torch.amp.GradScaler(device_type, enabled=self.dtype == torch.float16)
        self.unscaled = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """The context of one training step."""
        if self.dtype is None:
            yield
            return
        try:
            with ExitStack() as stack:
                # without a cache: weights change within a training step
                stack.enter_context(torch.autocast(self.device_type, self.dtype, cache_enabled=False))
                if self.scaler.is_enabled():
                    stack.enter_context(watch_backward(self.scaler.scale))
                yield
        finally:
            if self.unscaled:
                self.scaler.update()
                self.unscaled = False

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, where the loss is scaled."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)
            self.unscaled = True

    def take_step(self, optimizer: Optimizer, closure: Any = None) -> None:
        """Step; where the loss is scaled, with a look at the gradients, which the guard may not have had."""
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)
        else:
            optimizer.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """The loss scale."""
        return {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`; an empty state changes nothing."""
        if state.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


@cache
def with_training(base: type[BaseModel]) -> type[BaseModel]:
    """``base`` with :class:`TrainingMixin` before it, under its own name."""
    return base if issubclass(base, TrainingMixin) else type(base.__name__, (TrainingMixin, base), {})


def device_names(opt: dict[str, Any]) -> AbstractContextManager:
    """Where the options say the CPU, make what BasicSR's models call ``cuda`` mean that."""
    return CudaMeans(torch.device("cpu")) if opt["num_gpu"] == 0 else nullcontext()


def channels_last(net: nn.Module) -> None:
    """Put the weights of 2-d convolutions in channels-last order; those of 3-d ones have another."""
    for p in net.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
