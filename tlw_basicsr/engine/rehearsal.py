"""Tries the real model before anything is made: one iteration, one validation of each set, thrown away afterwards.

What a network, loss, optimiser, metric or model of BasicSR or a plugin demands is met here, in one line that names the
section and the stage, instead of in a traceback after an earlier run was moved aside.
"""

import gc
import io
import logging
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from basicsr.models import lr_scheduler
from basicsr.models.sr_model import SRModel
from basicsr.utils import set_random_seed
from basicsr.utils.logger import initialized_logger
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from tlw_basicsr.core.distances import MissingWeights
from tlw_basicsr.data.listing import list_images
from tlw_basicsr.data.resumable import CheckedDataset
from tlw_basicsr.engine.options import find_model
from tlw_basicsr.engine.preflight import check_batch, count_batch
from tlw_basicsr.engine.recorded import Asked, MissingOption, Place, Recorded, check_unread
from tlw_basicsr.models import TLWMixin, build_model
from tlw_basicsr.models.optimizers import OPTIMIZERS, SCHEDULERS
from tlw_basicsr.models.validation import LQ_ALONE, list_paths
from tlw_basicsr.registry import OTHER, check_arguments, find_doubts, find_origin, lookup
from tlw_basicsr.util.errors import UserError, first_line, short
from tlw_basicsr.util.kinds import Options, suggestion

# Functions that ask for the `type` of a section right before they build its part
BUILDERS = re.compile(
    "build_(network|loss|optimizer|schedulers)|setup_(optimizers|schedulers)|get_optimizer|calculate_metric"
)


def rehearse(opt: Options, given: Options) -> tuple[str, list[str]]:
    """Try what the options ask for, and check the keys that nobody has read.

    Nothing is written or logged, and random numbers begin anew afterwards. Of several processes each is alone here:
    what exists only in a group, such as ``sync_bn``, is left out, and so is ``use_compile``, which takes long.

    Returns:
        A line about what it took, empty with ``train.rehearse: false``; and a line for each key without effect.
    """
    model = find_model(opt)
    if opt["is_train"] and not opt["train"].get("rehearse", True):
        return "", check_unread(given, None, model, opt)
    start = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory(prefix="tlw_rehearsal_", ignore_cleanup_errors=True) as folder, silence():
        rehearsal = Rehearsal(opt, folder)
        rehearsal.run()
    asked, sets, notes = rehearsal.asked, rehearsal.validations, rehearsal.notes
    del rehearsal
    gc.collect()
    peak = _peak_memory(opt)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    set_random_seed(opt["manual_seed"] + opt["rank"])
    parts = ["one iteration"] * opt["is_train"] + [f"{sets} validation{'s' * (sets != 1)}"] * (sets > 0)
    line = f"Rehearsed {' and '.join(parts)} in {time.perf_counter() - start:.1f} s, {peak:.1f} GiB at most."
    return line, [*notes, *check_unread(given, asked, model, opt)]


class Rehearsal:
    """One iteration and a validation of each set by a copy of the options that remembers what was read.

    What a model writes although nobody asks it to goes to ``folder``.
    """

    def __init__(self, opt: Options, folder: str) -> None:
        self.opt, self.asked, self.notes = opt, Asked(), []
        self.model: Any = None
        self.validations = 0
        copy = deepcopy(opt)
        folders = ("experiments_root", "models", "training_states", "visualization", "results_root", "log")
        copy["path"].update({key: str(Path(folder, key)) for key in folders})
        if opt["is_train"]:
            train = copy["train"]
            # a generator that waits for its discriminator is tried at once; a step that is refused is no failure yet
            waits = {"net_d_iters": 1, "net_d_init_iters": 0}
            train.update({key: value for key, value in waits.items() if key in train})
            train.update(max_bad_steps=2, use_compile=False)
            if opt["dist"] and opt["num_gpu"] and (train.get("tlw") or {}).get("sync_bn"):
                train["tlw"]["sync_bn"] = False
        if copy.get("val"):
            copy["val"]["save_best"] = None
        if opt["dist"]:
            copy.update(dist=False, num_gpu=min(opt["num_gpu"], 1))
        self.copy = Recorded(copy, self.asked)

    def run(self) -> None:
        """Build, read, train and validate."""
        with self._stage("in building the model", ("model_type",)):
            self.model = build_model(self.copy)
        if self.opt["is_train"]:
            self._iterate()
        for key, dataset_opt in self.opt["datasets"].items():
            if dataset_opt["phase"] != "train" and self.opt.get("val"):
                self._validate(key, dataset_opt)

    def _iterate(self) -> None:
        model, dataset_opt = self.model, self.opt["datasets"]["train"]
        with self._stage("in reading the first batch", ("datasets", "train")):
            dataset = CheckedDataset(self.copy["datasets"]["train"], "datasets.train")
            check_batch(len(dataset), dataset_opt, self.opt)
            batch = next(iter(DataLoader(dataset, count_batch(dataset_opt, self.opt))))
        warmup = self.opt["train"].get("warmup_iter", -1)
        with self._stage("in the first iteration", ("model_type",)):
            if hasattr(model, "set_epoch"):
                model.set_epoch(0)
            model.update_learning_rate(1, warmup_iter=warmup)
            model.feed_data(batch)
            model.optimize_parameters(1)
            for value in model.get_current_log().values():
                format(value, ".4e")  # as the log writes it
            model.get_current_learning_rate()
            model.update_learning_rate(2, warmup_iter=warmup)
        self._check_step()

    def _check_step(self) -> None:
        """Check that the loss has not broadcast the output, and that the base model of TLW calls its pixel loss."""
        if mismatch := self._describe_mismatch():
            raise UserError(mismatch)
        if isinstance(self.model, TLWMixin) and not self.model.tlw.log:
            name = self.opt.get("base_model", "SRModel")
            message = f"base_model: {name} has not called its pixel loss, which TLW replaces, in the first iteration"
            if find_origin(find_model(self.opt)) != OTHER:
                raise UserError(message)
            self.notes.append(message)

    def _describe_mismatch(self) -> str:
        """Say that output and HR image differ in shape; a third party's model may mean that."""
        images = [getattr(self.model, name, None) for name in ("output", "gt")]
        shapes = [tuple(image.shape) for image in images if torch.is_tensor(image)]
        if len(set(shapes)) < 2 or find_origin(find_model(self.opt)) == OTHER:
            return ""
        name = self.opt["network_g"]["type"]
        return f"network_g: {name} gives {shapes[0]} where the HR image is {shapes[1]}{self._describe_batch()}"

    def _validate(self, key: str, dataset_opt: Options) -> None:
        name = dataset_opt["name"]
        iteration = 1 if self.opt["is_train"] else self.opt["name"]
        with self._stage(f"in the validation on {name}", ("datasets", key)):
            dataset = CheckedDataset(self.copy["datasets"][key], f"datasets.{key}")
            one = OneItem(dataset, _find_smallest(dataset, dataset_opt, f"datasets.{key}"))
            while True:
                try:
                    self.model.validation(DataLoader(one), iteration, None, False)
                    break
                except UserError as error:
                    self._leave_out_metric(error)
        self.validations += 1

    def _leave_out_metric(self, error: UserError) -> None:
        """Take a metric whose weights are missing out of a training that does not select its networks by it."""
        *section, name = self._find_place(error) or ("",)
        if not (_lacks_weights(error) and self.opt["is_train"] and section == ["val", "metrics"]):
            raise error
        if name == self.opt["val"].get("save_best"):
            raise error
        for opt in (self.opt, self.model.opt):
            del opt["val"]["metrics"][name]
        self.notes.append(f"val.metrics.{name} is left out: {error}")

    @contextmanager
    def _stage(self, stage: str, place: Place) -> Iterator[None]:
        """Turn an error within it into a line that names ``stage``, and ``place`` where no section is known."""
        self.asked.newest = ()
        try:
            yield
        except Exception as error:
            raise UserError(self._explain(error, stage, place)) from error

    def _explain(self, error: Exception, stage: str, place: Place) -> str:
        name = self.opt["model_type"]
        if isinstance(error, UserError) and error.__cause__ and str(error).startswith(name):
            error = error.__cause__  # type: ignore[assignment]  what build_model has met
        for missing in (error, error.__cause__):
            if isinstance(missing, MissingOption):
                return f"{missing.args[0]}: missing; it is read {stage}"
        if "iteration" in stage and (mismatch := self._describe_mismatch()):
            return mismatch
        place = self._find_place(error) or place
        where, section = ".".join(map(str, place)), _value_at(self.opt, place)
        if isinstance(error, UserError):
            if _lacks_weights(error) and stage == "in building the model":
                error = UserError(f"{error}{self._name_lpips()}")
            files = [f"path.{k}" for k, v in self.opt["path"].items() if "pretrain" in k and v and str(v) in str(error)]
            named = str(error).split(":")[0].split(".")[0].split()[0] in self.opt
            return str(error) if named else f"{(files or [where])[0]}: {error}"
        part = section.get("type") if isinstance(section, dict) else section
        call = _find_call(place, part)
        if isinstance(error, NotImplementedError) and str(place[-1]).startswith(("optim_", "scheduler")):
            names = SCHEDULERS if place[-1] == "scheduler" else OPTIMIZERS
            return f"{where}.type: {short(part)}{suggestion(part, names)}; accepted are {', '.join(names)}"
        doubts = ""
        if call and stage == "in building the model":
            extra = {"optim_": ("params",), "schedu": ("optimizer", "last_epoch")}.get(str(place[-1])[:6], ())
            try:
                check_arguments(section, where, call, extra=extra)
            except UserError as wrong:
                return str(wrong)
            doubts = find_doubts(section, call)
        hint, gt = self._name_options(str(error)), getattr(self.model, "batch", {}).get("gt")
        if place[-1] == "distance" and (crop := _value_at(self.opt, ("train", "tlw", "weight_crop"))):
            hint += f"; train.tlw.weight_crop: {crop}"
        if place[0].startswith("network_") and gt is not None and gt.shape[1] == 1:
            hint += "; the images have one channel, which num_in_ch: 1 takes"
        if place == ("network_g",) and "validation" in stage and type(self.model).test is SRModel.test:
            hint += "; a model that pads an image to what its network takes is SwinIRModel"
        return f"{where}: {part} fails {stage} ({first_line(error)}){doubts}{self._describe_batch()}{hint}"

    def _name_lpips(self) -> str:
        """Name the metric that selects networks, if it needs the weights that the distance lacks."""
        val = self.opt.get("val") or {}
        name = val.get("save_best")
        metric = (val.get("metrics") or {}).get(name, {})
        needs = metric.get("type") == "tlw_lpips" and not metric.get("weights")
        return f"; val.save_best: {name} needs such weights, too" if needs else ""

    def _name_options(self, message: str) -> str:
        """Return the options whose names are in an error's message, also as words: ``; KEY: VALUE``."""
        words = {p: str(p[-1]) for p in self.asked.places if "_" in str(p[-1])}
        named = sorted(p for p, key in words.items() if key in message or key.replace("_", " ") in message)
        values = [f"; {'.'.join(map(str, p))}: {short(_value_at(self.opt, p))}" for p in named]
        return "".join(values[:3])

    def _find_place(self, error: Exception) -> Place:
        """Return the section of the innermost part that the error comes from; empty where that is not known."""
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        owners = {id(part): place for part, place in self._list_parts()}
        for frame in reversed(frames):
            if BUILDERS.fullmatch(frame.f_code.co_name) and self.asked.newest:
                return self.asked.newest
            if place := owners.get(id(frame.f_locals.get("self"))):
                return place
        # a call with other arguments than a method takes has no frame of its own
        called = [place for part, place in self._list_parts() if f"{type(part).__name__}." in str(error)]
        return called[0] if called else ()

    def _list_parts(self) -> Iterator[tuple[Any, Place]]:
        """The model's networks, losses, optimisers and schedulers with the sections that they were built from."""
        for name, value in vars(self.model).items() if self.model else ():
            beginning, _, label = name.removesuffix("_ema").partition("_")
            if beginning == "net" and isinstance(value, nn.Module):
                yield value, (f"network_{label}",)
            elif beginning == "cri" and isinstance(value, nn.Module):
                losses = [k for k in self.opt["train"] if str(k).startswith(label) and str(k).endswith("_opt")]
                yield value, ("train", *losses[:1])
            elif beginning == "optimizer" and isinstance(value, Optimizer):
                yield getattr(value, "inner", value), ("train", f"optim_{label}")
        for scheduler in getattr(self.model, "schedulers", ()):
            yield scheduler, ("train", "scheduler")
        if isinstance(self.model, TLWMixin) and hasattr(self.model, "tlw"):
            yield self.model.tlw, ("train", "pixel_opt")
            yield self.model.tlw.distance, ("train", "pixel_opt", "distance")

    def _describe_batch(self) -> str:
        """The shapes of the images that the model was given, and in a validation where they come from."""
        batch = getattr(self.model, "batch", {})
        shapes = [f"{k} {tuple(batch[k].shape)}" for k in ("lq", "gt") if isinstance(batch.get(k), torch.Tensor)]
        paths = batch.get("lq_path")
        path = f", {paths[0]}" if isinstance(paths, list) and len(paths) == 1 else ""
        return f"; images: {', '.join(shapes)}{path}" if shapes else ""


class OneItem(CheckedDataset):
    """One item of a data set, which otherwise looks like the set."""

    def __init__(self, whole: CheckedDataset, index: int) -> None:
        vars(self).update(vars(whole), index=index)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> Any:
        return super().__getitem__(self.index)


def _find_smallest(dataset: Any, opt: Options, place: str) -> int:
    """Return the index of a set's smallest image by its headers, or 0 where a set's class is not known."""
    if not len(dataset):
        raise UserError(f"{place}: {opt['name']} has no image")
    entries = getattr(dataset, "entries", None)
    if entries is None:
        paths, kind = list_paths(dataset), lookup(DATASET_REGISTRY, opt, place)
        if opt["type"] not in ("PairedImageDataset", LQ_ALONE) or find_origin(kind) == OTHER or not paths:
            return 0
        listed = list_images({**opt, "meta_info_file": None}, "dataroot_lq", place)
        by_path = {str(Path(entry.path)): entry for entry in listed}
        entries = [by_path[str(Path(path))] for path in paths if str(Path(path)) in by_path]
        if len(entries) < len(paths):
            return 0
    sizes = [(min(entry.height, entry.width), entry.height * entry.width) for entry in entries]
    return sizes.index(min(sizes))


def _lacks_weights(error: BaseException) -> bool:
    """Whether a download has failed without which a distance or metric can't be computed."""
    return isinstance(error.__cause__, MissingWeights)


def _value_at(opt: Options, place: Place) -> Any:
    """Return the value at a place, or None."""
    value: Any = opt
    for key in place:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _find_call(place: Place, name: Any) -> Any:
    """Return the class or function of a section's ``type``, or None where it is not known."""
    if not isinstance(name, str) or place[0] in ("datasets", "model_type"):
        return None
    if place[-1] == "scheduler":
        known = {"MultiStepLR": "MultiStepRestartLR"}.get(name, name)  # BasicSR's own, under another name
        return getattr(lr_scheduler, known, None) or getattr(torch.optim.lr_scheduler, known, None)
    if str(place[-1]).startswith("optim_"):
        return getattr(torch.optim, name, None)
    registry = {"val": METRIC_REGISTRY, "train": LOSS_REGISTRY}.get(place[0], ARCH_REGISTRY)
    return lookup(registry, {"type": name}, ".".join(place))


@contextmanager
def silence() -> Iterator[None]:
    """Let nothing be printed, warned of or logged, and BasicSR's logger not be started: its file has no folder yet."""
    logger = logging.getLogger("basicsr")
    before, started = logger.disabled, "basicsr" in initialized_logger
    logger.disabled = initialized_logger["basicsr"] = True
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before
        if not started:
            del initialized_logger["basicsr"]


def _peak_memory(opt: Options) -> float:
    """Return the most memory of this process so far, or of its GPU in the rehearsal, in GiB."""
    if opt["num_gpu"] and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
