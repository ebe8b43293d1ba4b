"""BasicSR's command line and YAML, read safely and checked against what exists before anything runs."""

import argparse
import importlib
import inspect
import random
import re
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from basicsr.models.base_model import BaseModel
from basicsr.utils import set_random_seed
from basicsr.utils.registry import (
    ARCH_REGISTRY,
    DATASET_REGISTRY,
    LOSS_REGISTRY,
    METRIC_REGISTRY,
    MODEL_REGISTRY,
    Registry,
)

from tlw_basicsr.core.arguments import BOOL, STR, is_number, one_of, or_none, whole
from tlw_basicsr.engine.distributed import LAUNCHERS, find_rank
from tlw_basicsr.engine.schema import (
    DATASET_SECTIONS,
    DistOptions,
    LoggerOptions,
    TopOptions,
    TrainOptions,
    UncertaintyOptions,
    ValOptions,
)
from tlw_basicsr.losses.tlw_loss import complete_economy, describe_options, is_learned
from tlw_basicsr.metrics.paper_metrics import find_direction
from tlw_basicsr.models.tlw_model import TLWMixin, with_tlw
from tlw_basicsr.models.validation import LQ_ALONE, compares
from tlw_basicsr.networks import FROM_FILE, fill_defaults
from tlw_basicsr.registry import OTHER, OURS, check_arguments, find_origin, lookup
from tlw_basicsr.util.errors import UserError, expanded, first_line, short
from tlw_basicsr.util.files import read_bytes
from tlw_basicsr.util.kinds import ANY, DICT, NAMES_OR_TEXT, Options, check_section, list_kinds
from tlw_basicsr.util.yaml_options import force_options, load_yaml

LONGEST_YAML = 2**18  # bytes; reading one takes some seconds
PLUGINS = list_kinds(TopOptions)["plugins"]


def read_options(path: str, forced: Sequence[str] = (), allow_plugins: bool = True) -> Options:
    """Read a YAML file, apply ``forced`` entries and import its plugins, which are code; check nothing else."""
    try:
        text = read_bytes(path, "-opt", most=LONGEST_YAML).decode()
    except ValueError as error:
        raise UserError(f"-opt {path}: can't be read as text ({type(error).__name__})") from error
    opt = load_yaml(text, path)
    if not isinstance(opt, dict):
        raise UserError(f"-opt {path}: must hold options, 'key: value', not a {type(opt).__name__}")
    force_options(opt, list(forced))
    if not PLUGINS.accepts(opt.get("plugins")):
        raise UserError(f"plugins: expected {PLUGINS.text}, got {short(opt['plugins'])}")
    names = opt.get("plugins") or []
    if names and not allow_plugins:
        raise UserError(
            f"plugins: {path} names {', '.join(map(short, names))}, code that would run; --allow-plugins lets it, if "
            "you trust the file"
        )
    for name in names:
        _import_plugin(name)
    return opt


def parse_options(root_path: str, is_train: bool = True, argv: list[str] | None = None) -> tuple[Options, Any]:
    """Do what BasicSR's ``parse_options`` does: turn the command line and its YAML into checked options.

    Returns the options with BasicSR's additions, and the arguments; ``args.given`` are the options as they were given.
    Of several processes each learns its rank from the launcher; none has joined the others yet.
    """
    name = "train" if is_train else "test"
    parser = argparse.ArgumentParser(
        prog=f"tlw {name}",
        description=f"{name.capitalize()} a BasicSR model, with or without TLW. Example: tlw {name} FILE.yml",
    )
    parser.add_argument("-opt", required=True, metavar="FILE", help="the option YAML file; may be given without -opt")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="none", help="job launcher")
    parser.add_argument("--auto_resume", action="store_true", help="resume from the newest training state")
    parser.add_argument("--debug", action="store_true", help="log every iteration, validate and save every 8th")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by old launchers; not used")
    parser.add_argument("--force_yml", nargs="+", default=[], help="options to set, such as train:ema_decay=0.999")
    args = parser.parse_args(argv)

    opt = read_options(args.opt, args.force_yml)
    args.given = deepcopy(opt)
    check_options(opt, is_train)
    opt.update(auto_resume=args.auto_resume, is_train=is_train, dist=args.launcher != "none")
    devices = torch.cuda.device_count()
    if args.launcher == "none" and opt["num_gpu"] != "auto" and opt["num_gpu"] > devices:
        raise UserError(
            f"num_gpu: {opt['num_gpu']}, but {devices} are visible here; accepted are 0 to {devices}, or auto"
        )
    port = (opt.get("dist_params") or {}).get("port")
    opt["rank"], opt["world_size"] = find_rank(args.launcher, opt["num_gpu"] != 0, port)
    if opt.get("manual_seed") is None:
        opt["manual_seed"] = random.randint(1, 10000)
    set_random_seed(opt["manual_seed"] + opt["rank"])
    _complete(opt, Path(root_path), args.debug)
    return opt, args


def _import_plugin(name: str) -> None:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"plugins: {short(name)} is not the name of a module, such as my_package.archs")
    sys.path.append(str(Path.cwd()))
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:  # of what kind is up to the plugin
        raise UserError(f"plugins: {name} can't be imported ({first_line(error)})") from error
    finally:
        sys.path.pop()


def _complete(opt: Options, root: Path, debug: bool) -> None:
    """Add what BasicSR adds to the options it has read."""
    if debug and not opt["name"].startswith("debug"):
        opt["name"] = "debug_" + opt["name"]
    if opt["num_gpu"] == "auto":
        opt["num_gpu"] = torch.cuda.device_count()
    train = opt["train"] if opt["is_train"] else {}
    for key, used in (("use_amp", train), ("use_compile", train), ("tlw.use_amp", train.get("tlw") or {})):
        if used.get(key.split(".")[-1]) and opt["num_gpu"] > 1 and not opt["dist"]:
            raise UserError(f"train.{key}: needs a process for each GPU; start it by torchrun with --launcher pytorch")
    for key, dataset in opt["datasets"].items():
        dataset["phase"] = key.split("_")[0]
        if "scale" in opt:
            dataset["scale"] = opt["scale"]
    path = opt["path"]
    sections = [(f"datasets.{key}", dataset) for key, dataset in opt["datasets"].items()]
    for place, section in [*sections, ("path", path)]:
        for key, value in section.items():
            if isinstance(value, str) and key.startswith(("dataroot", "resume_state", "pretrain_network")):
                section[key] = str(expanded(value, f"{place}.{key}"))
    if isinstance(path.get("ignore_resume_networks"), str):
        path["ignore_resume_networks"] = re.findall(r"network_\w+", path["ignore_resume_networks"])
    if opt.get("val"):
        # a bar is for a person to look at
        opt["val"]["pbar"] = opt["val"].get("pbar", True) and sys.stderr.isatty()
    if opt["is_train"]:
        experiment = root / "experiments" / opt["name"]
        path.update(experiments_root=str(experiment), log=str(experiment))
        path.update({key: str(experiment / key) for key in ("models", "training_states", "visualization")})
        if "debug" in opt["name"]:
            opt["logger"].update(print_freq=1, save_checkpoint_freq=8)
            if opt.get("val"):
                opt["val"]["val_freq"] = 8
    else:
        results = root / "results" / opt["name"]
        path.update(results_root=str(results), log=str(results), visualization=str(results / "visualization"))


TLW = {name: option.kind for name, option in describe_options().items()}
UNCERTAINTY = list_kinds(UncertaintyOptions)
KNOWN_SETS = ("BicubicSRDataset", "PairedImageDataset")


def check_options(opt: Options, is_train: bool) -> None:
    """Check all options against what BasicSR, this package and loaded plugins have.

    Keys that only a model or data set of BasicSR or a plugin may read are left to the rehearsal, which sees whether
    it does. What ``preset: economy`` may leave out of a training is put in: ``losses.tlw_loss.complete_economy``.
    """
    if is_train:
        complete_economy(opt)
    networks = [key for key in opt if str(key).startswith("network_")]
    required = ["name", "model_type", "num_gpu", "datasets", "network_g", "path"]
    required += ["train", "logger"] if is_train else ["val"]
    model = find_model(opt)
    check_section(opt, "", list_kinds(TopOptions) | dict.fromkeys(networks, DICT), required, strict=False)
    check_section(opt.get("dist_params") or {}, "dist_params", list_kinds(DistOptions))
    for key in networks:
        _check_part(opt[key], key, ARCH_REGISTRY, model)
    _check_factor(opt, "network_g")
    kinds = {"resume_state": STR, "ignore_resume_networks": NAMES_OR_TEXT, "strict_load": BOOL}
    for label in [network.removeprefix("network_") for network in networks]:
        kinds |= {f"pretrain_network_{label}": STR, f"strict_load_{label}": BOOL, f"param_key_{label}": STR}
    check_section(opt["path"], "path", {key: or_none(kind) for key, kind in kinds.items()}, strict=False)
    _check_datasets(opt, is_train)
    if not is_train or opt.get("val"):
        _check_val(opt, is_train)
    if is_train:
        needed = ["print_freq", "save_checkpoint_freq", "use_tb_logger"]
        check_section(opt["logger"], "logger", list_kinds(LoggerOptions), needed, strict=False)
        _check_train(opt, model)


def find_model(opt: Options) -> Callable:
    """Return the model's class; for TLWModel, that of its base model with TLW."""
    model = lookup(MODEL_REGISTRY, opt, "", "model_type")
    if opt["model_type"] != "TLWModel":
        return model
    base = lookup(MODEL_REGISTRY, {"base_model": "SRModel", **opt}, "", "base_model")
    if not inspect.isclass(base) or issubclass(base, TLWMixin):
        raise UserError(f"base_model: {opt['base_model']} is no class that TLW can extend; SRModel is one")
    return with_tlw(base)


def _check_part(section: Options, place: str, registry: Registry, model: Callable) -> None:
    """Check a network or loss by its signature, unless the model may take keys out of the section itself."""
    call = lookup(registry, section, place)
    if find_origin(model) != OTHER:
        check_arguments(section, place, call)


def _check_factor(opt: Options, key: str) -> None:
    """The factor of a network is the scale, also where it is left to the default of the network's class."""
    section, scale, names = opt[key], opt.get("scale"), ("upscale", "scale", "upscale_factor")
    if section["type"] == FROM_FILE:
        section = fill_defaults(section)
    parameters = inspect.signature(lookup(ARCH_REGISTRY, section, key)).parameters
    for name in names:
        if name not in section:
            continue
        if scale is None:
            raise UserError(f"scale: missing; {key}.{name} is {short(section[name])}")
        if section[name] != scale:
            raise UserError(f"{key}.{name}: {short(section[name])} does not fit scale: {scale}")
    for name in names if scale and not section.keys() & set(names) else ():
        default = parameters[name].default if name in parameters else None
        if type(default) is int and default != scale:
            raise UserError(
                f"{key}.{name}: missing, and {section['type']}'s default of {default} does not fit scale: {scale}"
            )


def _check_datasets(opt: Options, is_train: bool) -> None:
    phases = ("train", "val") if is_train else ("test", "val")
    for key, dataset in opt["datasets"].items():
        place, phase = f"datasets.{key}", str(key).split("_")[0]
        if phase not in phases:
            raise UserError(f"{place}: unknown data set; accepted are {' and '.join(phases)}, also as {phases[1]}_2")
        if phase == "train" and key != "train":
            raise UserError(f"{place}: a training reads one training set, datasets.train; delete it or merge the two")
        _check_dataset(dataset, place, phase, lookup(DATASET_REGISTRY, dataset, place), opt)
    if is_train and "train" not in opt["datasets"]:
        raise UserError("datasets.train: missing; a training needs it")


def _check_dataset(dataset: Options, place: str, phase: str, kind: Callable, opt: Options) -> None:
    """Check a data set; the values of a third party's class are its own affair, but for what the loader reads."""
    origin, required = find_origin(kind), ["name", "type"]
    if phase == "train":
        required += ["batch_size_per_gpu", "num_worker_per_gpu"]
    if kind.__name__ in KNOWN_SETS and origin != OTHER:
        required += ["dataroot_gt", "io_backend"] + ["dataroot_lq"] * (origin != OURS)
        if "scale" not in opt and "scale" not in dataset:
            scale = list_kinds(TopOptions)["scale"].text
            raise UserError(f"scale: missing; {kind.__name__} needs it; expected {scale}")
    if origin == OURS and phase == "train":
        required.append("gt_size")
    kinds = list_kinds(DATASET_SECTIONS[origin]) | {"phase": ANY, "scale": ANY if origin == OTHER else whole(1)}
    check_section(dataset, place, kinds, required, strict=origin == OURS)
    if origin == OURS:
        check_section(dataset["io_backend"], f"{place}.io_backend", {"type": one_of("disk", "lmdb")}, ["type"])
    gt_size, scale = dataset.get("gt_size"), opt.get("scale", dataset.get("scale", 1))
    if phase == "train" and origin != OTHER and isinstance(gt_size, int) and gt_size and gt_size % scale:
        raise UserError(f"{place}.gt_size: {gt_size} is not a multiple of the scale {scale}")
    if dataset.get("persistent_workers") and not dataset.get("num_worker_per_gpu"):
        raise UserError(f"{place}.persistent_workers: true needs num_worker_per_gpu of at least 1")
    if dataset.get("prefetch_mode") == "cuda":
        if not torch.cuda.is_available() or opt["num_gpu"] == 0:
            raise UserError(f"{place}.prefetch_mode: cuda needs a GPU; accepted without one are cpu and ~")
        if not dataset.get("pin_memory"):
            raise UserError(f"{place}.prefetch_mode: cuda needs pin_memory: true")


def _check_val(opt: Options, is_train: bool) -> None:
    val, required = opt["val"], ["val_freq", "save_img"] if is_train else ["save_img"]
    check_section(val, "val", list_kinds(ValOptions), required, strict=False)
    sets = [(key, dataset) for key, dataset in opt["datasets"].items() if key != "train"]
    keys: dict[str, str] = {}
    for key, dataset in sets:
        name = dataset["name"]
        if keys.setdefault(name, key) != key:  # their images and best values would replace each other
            raise UserError(f"datasets.{key}.name: {name} is also that of datasets.{keys[name]}; name another")
    metrics, best = val.get("metrics") or {}, val.get("save_best")
    without = [key for key, dataset in sets if dataset["type"] == LQ_ALONE]
    for name, metric in metrics.items():
        place = f"val.metrics.{name}"
        call = lookup(METRIC_REGISTRY, metric, place)
        check_arguments(metric, place, call, ("type", "better"), ("img", "img1", "img2"))  # img1 in old forks
        if not one_of("higher", "lower").accepts(metric.get("better", "higher")):
            raise UserError(f"{place}.better: expected one of higher, lower, got {short(metric['better'])}")
        better = find_direction(metric)
        if better and metric.setdefault("better", better) != better:  # BasicSR's default is higher for all
            raise UserError(f"{place}.better: {metric['better']}, but {metric['type']} is better where it is {better}")
        decides = best == name and sets and sets[0][0] in without
        if compares(metric) and without and (decides or len(without) == len(sets)):
            raise UserError(
                f"{place}: {metric['type']} compares with HR images, and datasets.{without[0]} has none; delete it "
                "(images are saved without metrics too), or take a data set of pairs"
                + (" as the first" if decides else "")
            )
    if best and best not in metrics:
        accepted = ", ".join(map(str, metrics)) or "none"
        raise UserError(f"val.save_best: {best} is not in val.metrics; accepted are {accepted}")
    if val.get("patience") and not best:
        raise UserError("val.patience: needs val.save_best, the metric that it goes by")
    if best and not hasattr(BaseModel, "_update_best_metric_result"):
        raise UserError("val.save_best: needs BasicSR 1.3.4.4 or later, which knows of best metrics; delete it")
    if not is_train:
        val.setdefault("suffix", None)


def _check_train(opt: Options, model: Callable) -> None:
    train = opt["train"]
    optimisers = [key for key in train if str(key).startswith("optim_")]
    losses = [key for key in train if str(key).endswith("_opt")]
    kinds = list_kinds(TrainOptions) | dict.fromkeys(optimisers, DICT) | dict.fromkeys(losses, or_none(DICT))
    check_section(train, "train", kinds, ["total_iter", "optim_g", "scheduler"], strict=False)
    for key in losses:
        if train[key]:
            _check_part(train[key], f"train.{key}", LOSS_REGISTRY, model)
    for model_type, pixel_type in (("TLWModel", "TLWLoss"), ("UncertaintyModel", "UncertaintyLoss")):
        _check_pixel_loss(opt, model_type, pixel_type)
    if opt["model_type"] == "TLWModel":
        _check_tlw(opt, train)
    if opt["model_type"] == "UncertaintyModel":
        check_section(train.get("uncertainty") or {}, "train.uncertainty", UNCERTAINTY, ["stage_one_iter"])
        if "network_u" in opt:
            _check_factor(opt, "network_u")
    for key in [*optimisers, "scheduler"]:
        check_section(train[key], f"train.{key}", {"type": STR}, ["type"], strict=False)
    _check_schedule(train["scheduler"], train["total_iter"])
    if train.get("accumulation_steps", 1) > 1 and train.get("use_amp") == "fp16":
        raise UserError("train.accumulation_steps: with use_amp the scale of fp16 changes in between; accepted is bf16")
    wandb = opt["logger"].get("wandb") or {}
    if wandb.get("project") and not opt["logger"]["use_tb_logger"]:
        raise UserError("logger.wandb.project: needs use_tb_logger: true")


def _check_schedule(section: Options, total_iter: float) -> None:
    """A schedule has milestones that are reached in their order, and lasts until the end of the training."""
    milestones, periods, place = section.get("milestones"), section.get("periods"), "train.scheduler"
    if isinstance(milestones, list) and (
        not all(is_number(m) and m == int(m) for m in milestones) or any(a > b for a, b in pairwise(milestones))
    ):
        raise UserError(
            f"{place}.milestones: expected whole numbers, none below the one before it, got {short(milestones)}; "
            "a number has no comma, which YAML takes for the end of it"
        )
    if isinstance(periods, list) and all(map(is_number, periods)) and sum(periods) < total_iter:
        last = (periods or [0])[-1] + total_iter - sum(periods)
        raise UserError(
            f"{place}.periods: their sum, {sum(periods)}, is less than train.total_iter: {total_iter}; "
            f"make the last one {last:.16g}, or add one and its restart_weights"
        )
    end = section.get("total_steps")  # OneCycleLR fails after it
    if end is not None and is_number(end) and end < total_iter:
        raise UserError(f"{place}.total_steps: it ends after {end} iterations, before train.total_iter: {total_iter}")


def _check_pixel_loss(opt: Options, model_type: str, pixel_type: str) -> None:
    """A model and the pixel loss that is made for it need each other."""
    given, place = (opt["train"].get("pixel_opt") or {}).get("type"), "train.pixel_opt.type"
    if opt["model_type"] != model_type and given == pixel_type:
        base = " (and base_model, if not SRModel)" if model_type == "TLWModel" else ""
        raise UserError(f"{place}: {pixel_type} needs model_type: {model_type}{base}")
    if opt["model_type"] == model_type and given != pixel_type:
        raise UserError(f"{place}: {short(given)}; accepted with model_type: {model_type} is {pixel_type}")


def _check_tlw(opt: Options, train: Options) -> None:
    """Check the options of TLW, and that a control has none of the learned weighting's."""
    check_section(train.get("tlw") or {}, "train.tlw", TLW)
    if not is_learned(train["pixel_opt"]):
        weights = train["pixel_opt"]["weights"]
        weights = weights["type"] if isinstance(weights, dict) else weights
        for section, place, key in (
            (opt, "", "network_w"),
            (opt["path"], "path.", "pretrain_network_w"),
            (train, "train.", "optim_w"),
            (train["pixel_opt"], "train.pixel_opt.", "distance"),
        ):
            if key in section:
                raise UserError(f"{place}{key}: not used with train.pixel_opt.weights: {weights}; delete it")
        return
    distance, place = train["pixel_opt"].get("distance"), "train.pixel_opt.distance"
    if distance is not None:
        check_arguments(distance, place, lookup(LOSS_REGISTRY, distance, place))
