"""Adds atomic checkpoints, full training states, guarded steps and mixed precision to any BasicSR model."""

from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
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
from tlw_basicsr.core.graphs import copy_all
from tlw_basicsr.core.weight_net import paper_start_values
from tlw_basicsr.models import states
from tlw_basicsr.models.guard import StepGuard, is_sound, list_parameters
from tlw_basicsr.models.optimizer import MixedPrecision, TrainingOptimizer
from tlw_basicsr.models.optimizers import OPTIMIZERS, SCHEDULERS
from tlw_basicsr.models.validation import describe_average, validate_alone
from tlw_basicsr.networks import check_fit, describe_fit, read_network
from tlw_basicsr.util.errors import UserError, first_line
from tlw_basicsr.util.files import save_file


class TrainingMixin(BaseModel):
    """Checkpoints, devices and optimiser steps of a BasicSR model; a base class that precedes the model's own.

    Its options are those of :class:`tlw_basicsr.engine.schema.TrainOptions` and ``val.save_best``.
    """

    own_optimizers = 0  # how many a subclass adds after those of the BasicSR model

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
        self.noted = states.note_attributes(self)

    # ------------------------------------------------------------------------------------------------- building

    def init_training_settings(self) -> None:
        """Build what the model's own builds; the guard sees what its losses return."""
        super().init_training_settings()
        for name, loss in vars(self).items():
            if name.startswith("cri_") and isinstance(loss, nn.Module):
                loss.register_forward_hook(lambda _, __, value: self.watch_losses(value))

    def get_optimizer(self, optim_type: str, params: Any, lr: float, **kwargs: Any) -> Optimizer:
        """Build the model's own optimiser, or torch's of the name."""
        if kwargs.get("betas"):
            kwargs["betas"] = tuple(map(float, kwargs["betas"]))  # torch takes no [0, 0.99]
        try:
            return super().get_optimizer(optim_type, params, lr, **kwargs)
        except NotImplementedError:
            if optim_type not in OPTIMIZERS:
                raise
        return OPTIMIZERS[optim_type](params, lr=lr, **kwargs)

    def setup_optimizers(self) -> None:
        """Build the model's own optimisers, each within a :class:`TrainingOptimizer`."""
        super().setup_optimizers()
        wrapped = {id(optimizer): self.wrap_optimizer(optimizer) for optimizer in self.optimizers}
        self.optimizers: list[Any] = list(wrapped.values())
        for name, value in list(vars(self).items()):
            if id(value) in wrapped:
                setattr(self, name, wrapped[id(value)])

    def wrap_optimizer(self, optimizer: Optimizer) -> TrainingOptimizer:
        """Add what the options ask of every step."""
        train = self.opt["train"]
        every, limit = train.get("accumulation_steps", 1), train.get("clip_grad_norm")
        return TrainingOptimizer(optimizer, self.guard, self.amp, every, limit)

    def setup_schedulers(self) -> None:
        """Build the model's own schedulers, or torch's of the name in ``train.scheduler``."""
        section = dict(self.opt["train"]["scheduler"])  # BasicSR removes the type from it
        try:
            super().setup_schedulers()
        except NotImplementedError:
            name = section.pop("type")
            if name not in SCHEDULERS:
                raise
            self.schedulers = [SCHEDULERS[name](optimizer, **section) for optimizer in self.optimizers]

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """As BasicSR's, with ``use_channels_last`` and ``use_compile``; distributed on CPU processes too."""
        train = (self.opt.get("train") or {}) if self.is_train else {}
        if train.get("init_g") == "paper" and net is getattr(self, "net_g", None):
            generator = torch.Generator().manual_seed(self.opt["manual_seed"])
            net.apply(partial(paper_start_values, generator=generator))
        if train.get("use_channels_last"):
            channels_last(net)
        if mode := train.get("use_compile"):
            # CUDA graphs of the SR network alone: the others are called more than once in an iteration
            net.compile(mode=mode if mode is not True and net is getattr(self, "net_g", None) else None)
        if self.opt["dist"] and self.device.type == "cpu":
            unused = self.opt.get("find_unused_parameters", False)
            return DistributedDataParallel(net, find_unused_parameters=unused)
        return super().model_to_device(net)

    def load_pretrained(self, net: nn.Module, label: str) -> nn.Module:
        """Log a network, load what ``path.pretrain_network_{label}`` names, and put it into train mode."""
        self.print_network(net)
        path = self.opt["path"]
        if path.get(f"pretrain_network_{label}") is not None:
            strict, key = path.get(f"strict_load_{label}") is not False, path.get(f"param_key_{label}", "params")
            self.load_network(net, path[f"pretrain_network_{label}"], strict, key)
        return net.train()

    def networks(self) -> dict[str, nn.Module]:
        """Return ``net_g``, ``net_g_ema`` and the others by their names."""
        return {name: value for name, value in vars(self).items() if name[:3] == "net" and isinstance(value, nn.Module)}

    # ------------------------------------------------------------------------------------------------- iterations

    def feed_data(self, data: dict[str, Any]) -> None:
        """As the model's own, on its device."""
        # On the CPU `.to()` makes no copy, and BasicSR's video validation squeezes the tensors that it has fed.
        self.batch = data = {k: value.detach() if torch.is_tensor(value) else value for k, value in data.items()}
        with device_names(self.opt):
            super().feed_data(data)

    def update_learning_rate(self, current_iter: int, warmup_iter: int = -1) -> None:
        """As BasicSR's, but the schedulers go on from their own rate, not from that of the warm-up.

        Raises:
            UserError: a scheduler fails, as after its end.
        """
        if 1 < current_iter <= warmup_iter:
            for scheduler in self.schedulers:
                for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=False):
                    group["lr"] = lr
        try:
            super().update_learning_rate(current_iter, warmup_iter=warmup_iter)
        except Exception as error:  # a scheduler raises what it likes
            raise UserError(f"train.scheduler: fails in iteration {current_iter:,} ({first_line(error)})") from error

    def optimize_parameters(self, current_iter: int) -> None:
        """As the model's own, in mixed precision by the options; an iteration that is not finite is undone.

        Raises:
            UserError: ``train.max_bad_steps`` iterations in a row were not finite.
        """
        if self.opt["train"].get("use_compile"):
            torch.compiler.cudagraph_mark_step_begin()
        try:
            with self.guard.iteration(self.networks().values(), lambda: self.list_images().values()), self.amp.step():
                super().optimize_parameters(current_iter)
        except Exception:
            # some losses refuse what is not finite; in a distributed training the other processes wait for this one
            if self.opt["dist"] or not self.guard.enabled or not (names := self.name_not_finite(self.list_terms())):
                raise
        else:
            if not self.guard.refused:
                self.guard.in_row = 0
                return
            logged = {n: torch.tensor(float(v)) for n, v in self.log_dict.items() if n.startswith("l")}
            names = self.name_not_finite({**self.list_terms(), **logged})
        self.undo_iteration()
        self.log_bad_step(current_iter, names)

    def watch_losses(self, value: Any) -> None:
        """Let the guard see a loss, or several, of this iteration."""
        if self.guard.active:
            self.guard.losses += [
                loss.detach()
                for loss in (value if isinstance(value, (list, tuple)) else [value])
                if torch.is_tensor(loss)
            ]

    def list_images(self) -> dict[str, Any]:
        """Return the images that must be finite for a step."""
        return {name: getattr(self, name, None) for name in ("lq", "gt", "output")}

    def list_terms(self) -> dict[str, Any]:
        """Return the tensors among which the cause of a refusal is looked for, by their names in the log."""
        return self.list_images()

    def undo_iteration(self) -> None:
        """Put back what a refused iteration has changed."""
        self.guard.undo(self.optimizers)

    def name_not_finite(self, terms: dict[str, Any]) -> list[str]:
        """Return the names of terms, gradients and networks that are not finite."""
        names = [name for name, value in terms.items() if not is_sound([value])]
        for number, optimizer in enumerate(self.optimizers):
            if not is_sound((), optimizer):
                name = next((k for k, v in vars(self).items() if v is optimizer), f"optimizer {number}")
                finite = is_sound(p.grad for p in list_parameters(optimizer))
                names.append(f"{'step' if finite else 'gradient'} of {name}")
        nets = self.networks().items()
        return names + [f"state of {name}" for name, net in nets if not is_sound(self.guard.list_buffers(net))]

    def agreed(self, flag: Tensor) -> Tensor:
        """Return ``flag``, true only where it is true in every process."""
        if not self.opt["dist"]:
            return flag
        flag = flag.to(torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return flag.bool()

    def log_bad_step(self, current_iter: int, terms: list[str]) -> None:
        """Log which terms of which images were not finite; at ``max_bad_steps`` in a row, keep the batch and stop.

        Raises:
            UserError: that many; the message names the file ``bad_step_{current_iter}.pth``.
        """
        values = [v for key, v in self.batch.items() if key.endswith("path") or key == "key"]
        paths = list(dict.fromkeys(p for v in values for p in (v if isinstance(v, (list, tuple)) else [v])))
        causes = [cause for cause in states.gather(self.opt, (terms, paths)) if cause[0]]
        text = "; ".join(f"{', '.join(names)} (images {', '.join(map(str, images))})" for names, images in causes)
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

    def reduce_loss_dict(self, loss_dict: dict[str, Tensor]) -> OrderedDict[str, Any]:
        """Return the losses as they are: :meth:`read_losses` averages and reads them when the log is written."""
        return OrderedDict((name, value.detach()) for name, value in loss_dict.items())

    def read_losses(self, losses: dict[str, Any]) -> OrderedDict[str, float]:
        """Return numbers as they are, and tensors as BasicSR's ``reduce_loss_dict`` does, averaged over processes."""
        tensors = OrderedDict((name, value) for name, value in losses.items() if torch.is_tensor(value))
        return OrderedDict(losses) | super().reduce_loss_dict(tensors) if tensors else OrderedDict(losses)

    def get_current_log(self) -> OrderedDict[str, float]:
        """Return the model's own log and the number of refused steps, if there are any, or in mixed precision."""
        log = self.read_losses(super().get_current_log())
        if self.guard.skipped or self.amp.dtype is not None:
            log["skipped"] = self.guard.skipped
        return log

    def model_ema(self, decay: float = 0.999) -> None:
        """As BasicSR's, and a copy of the buffers; not in iterations that are refused or only add to the gradient."""
        if decay and (self.guard.refused or getattr(self.optimizers[0], "accumulated", 0)):
            return
        net_g = self.get_bare_model(self.net_g)
        theirs: dict[str, Tensor] = {**dict(net_g.named_parameters()), **dict(net_g.named_buffers())}
        if super().model_ema.__func__ is not BaseModel.model_ema:  # a model with an average of its own
            super().model_ema(decay)
        else:
            names, ours = zip(*self.net_g_ema.named_parameters(), strict=True)
            with torch.no_grad():
                torch._foreach_mul_(ours, decay)  # pyright: ignore[reportPrivateImportUsage]
                torch._foreach_add_(ours, [theirs[name] for name in names], alpha=1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        buffers = {
            name: ours
            for name, ours in self.net_g_ema.named_buffers()
            if name in theirs and ours.shape == theirs[name].shape  # another shape is that of another image
        }
        copy_all(buffers.values(), [theirs[name] for name in buffers])

    # ------------------------------------------------------------------------------------------------- validation

    def validation(self, dataloader: DataLoader, current_iter: int, *args: Any, **kwargs: Any) -> None:
        """As the model's own, on its device, by the bare network; the best networks are saved by the options.

        One process may validate alone, and a distributed network would wait for the others to share its buffers.
        """
        if self.is_train and hasattr(self, "net_g_ema"):
            age = describe_average(getattr(self, "ema_decay", 0), current_iter)  # GFPGAN's model has none
            get_root_logger().info(f"Validation of params_ema{age}.")
        wrapped, self.net_g = self.net_g, self.get_bare_model(self.net_g)
        try:
            with device_names(self.opt), validate_alone(self, dataloader.dataset), uncompiled(self.opt):
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
        if dataset == first and self.best_metric_results[first][metric]["iter"] == current_iter:
            self.save(-1, "best")

    # ------------------------------------------------------------------------------------------------- files

    @master_only
    def save_network(
        self,
        net: nn.Module | list[nn.Module],
        net_label: str,
        current_iter: int,
        param_key: str | list[str] = "params",
    ) -> None:
        """Write ``{net_label}_{current_iter}.pth`` in BasicSR's format, whole or not at all; -1 is ``latest``."""
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
        """Return what BasicSR's own states lack; called by every process."""
        return states.collect_state(self)

    def save_training_state(self, epoch: int, current_iter: int | str) -> None:
        """Write ``{current_iter}.state``, except for -1 and ``best``."""
        states.write_state(self, epoch, current_iter)

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Take a state: the optimisers, the schedulers and everything of :meth:`training_state`.

        Raises:
            Exception: it is damaged or of another training; the model has to be built anew then.
        """
        states.take_training(self, resume_state, super().resume_training)
        states.take_rest(self, resume_state)


@cache
def with_training(base: type[BaseModel]) -> type[BaseModel]:
    """Return ``base`` with :class:`TrainingMixin` before it, under its own name."""
    return base if issubclass(base, TrainingMixin) else type(base.__name__, (TrainingMixin, base), {})


def device_names(opt: dict[str, Any]) -> AbstractContextManager:
    """Where the options say CPU, let what BasicSR's models call ``cuda`` mean that."""
    return CudaMeans(torch.device("cpu")) if opt["num_gpu"] == 0 else nullcontext()


def uncompiled(opt: dict[str, Any]) -> AbstractContextManager:
    """Where networks are compiled, run them as they are written: every size of an image would be compiled anew."""
    compiled = (opt.get("train") or {}).get("use_compile")
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def channels_last(net: nn.Module) -> None:
    """Put the weights of 2-d convolutions in channels-last order; those of 3-d ones have another."""
    for p in net.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
