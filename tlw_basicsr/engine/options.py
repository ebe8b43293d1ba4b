"""BasicSR's command line and YAML, read safely and checked against what exists before anything runs."""

import argparse
import importlib
import inspect
import random
import re
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from basicsr.utils import set_random_seed
from basicsr.utils.registry import (
    ARCH_REGISTRY,
    DATASET_REGISTRY,
    LOSS_REGISTRY,
    METRIC_REGISTRY,
    MODEL_REGISTRY,
)

from tlw_basicsr.engine.distributed import LAUNCHERS, init_distributed
from tlw_basicsr.engine.schema import (
    BasicSROptions,
    BicubicSROptions,
    DistOptions,
    LoaderOptions,
    LoggerOptions,
    TopOptions,
    TrainOptions,
    UncertaintyOptions,
    ValOptions,
)
from tlw_basicsr.losses.tlw_loss import complete_economy, describe_options
from tlw_basicsr.models.optimizers import check_optimizer, check_scheduler
from tlw_basicsr.models.tlw_model import with_tlw
from tlw_basicsr.registry import (
    BASICSR,
    OTHER,
    OURS,
    asks_for,
    check_arguments,
    check_read_section,
    find_origin,
    find_popped_keys,
    list_models_asking_for,
    lookup,
    overrides,
    read_keys,
)
from tlw_basicsr.util.errors import UserError, expanded, first_line, short
from tlw_basicsr.util.files import read_bytes
from tlw_basicsr.util.kinds import (
    ANY,
    BOOL,
    DICT,
    NAMES,
    STR,
    Kind,
    Options,
    check_section,
    list_kinds,
    one_of,
    or_none,
)
from tlw_basicsr.util.yaml_options import force_options, load_yaml

LONGEST_YAML = 2**18  # bytes; reading one takes some seconds
PLUGINS = list_kinds(TopOptions)["plugins"]


# ------------------------------------------------------------------------------------------------- reading


def read_options(path: str, forced: Sequence[str] = (), allow_plugins: bool = True) -> Options:
    """The options of a YAML file with ``forced`` entries applied, not checked yet; its plugins, code, are imported.

    Args:
        path: the file.
        forced: ``--force_yml`` entries.
        allow_plugins: False refuses options with plugins.

    Raises:
        UserError: it can't be read, holds no options, or a plugin can't be imported.
    """
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
    """BasicSR's ``parse_options``: the command line and its YAML to the options, checked.

    Args:
        root_path: folder in which ``experiments/`` or ``results/`` is.
        is_train: for ``train.py`` or ``test.py``.
        argv: the command line's arguments, ``sys.argv[1:]`` if None.

    Returns:
        The options, with BasicSR's additions, and the arguments; ``args.notes`` are lines for the log, ``args.given``
        the options as they were given.

    Raises:
        UserError: see :func:`check_options`.
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
    args.notes = check_options(opt, is_train)
    opt.update(auto_resume=args.auto_resume, is_train=is_train, dist=args.launcher != "none")
    devices = torch.cuda.device_count()
    if args.launcher == "none" and opt["num_gpu"] != "auto" and opt["num_gpu"] > devices:
        raise UserError(
            f"num_gpu: {opt['num_gpu']}, but {devices} are visible here; accepted are 0 to {devices}, or auto"
        )
    opt["rank"], opt["world_size"] = init_distributed(
        args.launcher, opt["num_gpu"] != 0, **(opt.get("dist_params") or {})
    )
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
        for root_key in [k for k in dataset if k.startswith("dataroot")]:
            if isinstance(dataset[root_key], str):
                dataset[root_key] = str(expanded(dataset[root_key], f"datasets.{key}.{root_key}"))
    path = opt["path"]
    for key, value in path.items():
        if value is not None and ("resume_state" in key or "pretrain_network" in key):
            path[key] = str(expanded(value, f"path.{key}"))
    if opt.get("val"):
        # a bar is for a person to look at
        opt["val"]["pbar"] = opt["val"].get("pbar", True) and sys.stderr.isatty()
    if opt["is_train"]:
        experiment = root / "experiments" / opt["name"]
        path.update(
            experiments_root=str(experiment),
            models=str(experiment / "models"),
            training_states=str(experiment / "training_states"),
            log=str(experiment),
            visualization=str(experiment / "visualization"),
        )
        if "debug" in opt["name"]:
            opt["logger"].update(print_freq=1, save_checkpoint_freq=8)
            if opt.get("val"):
                opt["val"]["val_freq"] = 8
    else:
        results = root / "results" / opt["name"]
        path.update(results_root=str(results), log=str(results), visualization=str(results / "visualization"))


# ------------------------------------------------------------------------------------------------- checks


TLW = {name: option.kind for name, option in describe_options().items()}


def check_options(opt: Options, is_train: bool) -> list[str]:
    """Check all options against what BasicSR, this package and loaded plugins have.

    What ``preset: economy`` may leave out of a training is put in: ``losses.tlw_loss.complete_economy``.

    Returns:
        A line for each option that is legal and without effect.

    Raises:
        UserError: a key is unknown or missing, a value is of the wrong kind, a name is not registered, or options do
            not fit each other. One line that names the key and says what is accepted.
    """
    notes: list[str] = []
    if is_train:
        complete_economy(opt)
    networks = [key for key in opt if str(key).startswith("network_")]
    required = ["name", "model_type", "num_gpu", "datasets", "network_g", "path"]
    required += ["train", "logger"] if is_train else ["val"]
    model = find_model(opt)
    check_read_section(opt, "", list_kinds(TopOptions) | dict.fromkeys(networks, DICT), model, notes, required)
    check_section(opt.get("dist_params") or {}, "dist_params", list_kinds(DistOptions))
    for key in networks:
        check_arguments(
            opt[key], key, lookup(ARCH_REGISTRY, opt[key], key), notes=notes, others=find_popped_keys(model)
        )
    _check_factor(opt)
    _check_path(opt, networks, model, notes)
    _check_datasets(opt, is_train, notes)
    if not is_train or opt.get("val"):
        _check_val(opt, is_train, model, notes)
    if is_train:
        needed = ["print_freq", "save_checkpoint_freq", "use_tb_logger"]
        check_read_section(opt["logger"], "logger", list_kinds(LoggerOptions), model, notes, needed)
        _check_train(opt, model, notes)
        _check_asked_for(opt, networks, model, notes)
    return notes


def find_model(opt: Options) -> Callable:
    """The class of the model; for TLWModel, of its base model with TLW."""
    model = lookup(MODEL_REGISTRY, opt, "", "model_type")
    if opt["model_type"] != "TLWModel":
        return model
    base = lookup(MODEL_REGISTRY, {"base_model": "SRModel", **opt}, "", "base_model")
    if not calls_pixel_loss(base):
        choices = [name.removesuffix("_basicsr") for name, kind in MODEL_REGISTRY if calls_pixel_loss(kind)]
        raise UserError(f"base_model: {opt['base_model']} has no pixel loss; accepted are {', '.join(sorted(choices))}")
    return with_tlw(base)


def calls_pixel_loss(model: Any) -> bool:
    """Whether a model class or one of its bases calls ``self.cri_pix``, which is where TLW stands."""
    if not inspect.isclass(model):
        return False
    try:
        return any("self.cri_pix(" in inspect.getsource(c) for c in inspect.getmro(model) if c.__module__ != "builtins")
    except (OSError, TypeError):  # no source to look at; the model itself will tell
        return True


def _check_asked_for(opt: Options, networks: list[str], model: Callable, notes: list[str]) -> None:
    """A network, loss or optimiser that the model never asks for would silently have no effect.

    An optimiser that a third party's YAML has left over, of a network that is not there, does no harm.
    """
    sections = {key: key for key in networks}
    used = [key for key, value in opt["train"].items() if value and re.match("optim_|.*_opt$", str(key))]
    sections |= {f"train.{key}": key for key in used}
    name = opt.get("base_model", "SRModel") if opt["model_type"] == "TLWModel" else opt["model_type"]
    for place, key in sections.items():
        if asks_for(model, key):
            continue
        if key.startswith("optim_") and find_origin(model) == OTHER and key.replace("optim", "network") not in networks:
            notes.append(f"{place}: {name} never asks for it, so it has no effect")
            continue
        models = ", ".join(other for other in list_models_asking_for(key) if other != name)
        way = f"choose one that does ({models})" if models else "load one that does by plugins:"
        raise UserError(f"{place}: {name} never asks for it, so it would have no effect; delete it, or {way}")


def _check_factor(opt: Options) -> None:
    """The SR network's factor is the scale, also where it is left to the default of the network's class."""
    section, names = opt["network_g"], ("upscale", "scale", "upscale_factor")
    scale = opt.get("scale")
    parameters = inspect.signature(lookup(ARCH_REGISTRY, section, "network_g")).parameters
    defaults = {name: parameters[name].default for name in names if name in parameters}
    for name in names:
        factor = section.get(name, scale)
        if scale is None and name in section:
            raise UserError(f"scale: missing; network_g.{name} is {short(factor)}")
        if factor != scale:
            raise UserError(f"network_g.{name}: {short(factor)} does not fit scale: {scale}")
        if scale and not section.keys() & set(names) and type(defaults.get(name)) is int and defaults[name] != scale:
            raise UserError(
                f"network_g.{name}: missing, and {section['type']}'s default of {defaults[name]} does not fit "
                f"scale: {scale}"
            )


def _check_path(opt: Options, networks: list[str], model: Callable, notes: list[str]) -> None:
    schema: dict[str, Kind] = {"resume_state": or_none(STR), "ignore_resume_networks": or_none(NAMES)}
    schema["strict_load"] = or_none(BOOL)
    read = read_keys(model)
    for beginning, kind in (("pretrain_network_", STR), ("strict_load_", BOOL), ("param_key_", STR)):
        schema |= {f"{beginning}{network.removeprefix('network_')}": or_none(kind) for network in networks}
        schema |= {key: or_none(kind) for key in read if key.startswith(beginning)}
    check_read_section(opt["path"], "path", schema, model, notes)


def _check_datasets(opt: Options, is_train: bool, notes: list[str]) -> None:
    phases = ("train", "val") if is_train else ("test", "val")
    for key, dataset in opt["datasets"].items():
        place, phase = f"datasets.{key}", str(key).split("_")[0]
        if phase not in phases:
            raise UserError(f"{place}: unknown data set; accepted are {' and '.join(phases)}, also as {phases[1]}_2")
        kind = lookup(DATASET_REGISTRY, dataset, place)
        _check_dataset(dataset, place, phase, kind, opt, notes)
    if is_train and "train" not in opt["datasets"]:
        raise UserError("datasets.train: missing; a training needs it")


def _check_dataset(dataset: Options, place: str, phase: str, kind: Callable, opt: Options, notes: list[str]) -> None:
    required = ["name", "type"]
    if phase == "train":
        required += ["batch_size_per_gpu", "num_worker_per_gpu"]
    if kind.__name__ in ("BicubicSRDataset", "PairedImageDataset"):
        required += ["dataroot_gt", "io_backend"] + (["gt_size"] if phase == "train" else [])
    if kind.__name__ == "PairedImageDataset":
        flips = ["use_flip", "use_hflip", "use_rot"] if phase == "train" else []
        required += ["dataroot_lq", *(key for key in flips if key in read_keys(kind))]  # forks have other names
    # a third party's values are its own affair, but for what the loader reads
    section = {OURS: BicubicSROptions, BASICSR: BasicSROptions, OTHER: LoaderOptions}[find_origin(kind)]
    check_read_section(dataset, place, list_kinds(section) | {"phase": ANY, "scale": ANY}, kind, notes, required)
    if "scale" not in opt and kind.__name__ in ("BicubicSRDataset", "PairedImageDataset"):
        raise UserError(f"scale: missing; {kind.__name__} needs it; expected {list_kinds(TopOptions)['scale'].text}")
    if "io_backend" in dataset and section is not LoaderOptions:
        check_section(dataset["io_backend"], f"{place}.io_backend", {"type": one_of("disk", "lmdb")}, ["type"])
    gt_size = dataset.get("gt_size")
    if phase == "train" and isinstance(gt_size, int) and gt_size and gt_size % opt.get("scale", 1):
        raise UserError(f"{place}.gt_size: {gt_size} is not a multiple of the scale {opt['scale']}")
    if phase == "train" and "gt_size" in dataset and not gt_size and kind.__name__ == "PairedImageDataset":
        raise UserError(
            f"{place}.gt_size: expected a whole number of at least 1 for {kind.__name__}, got {short(gt_size)}"
        )
    if dataset.get("persistent_workers") and not dataset.get("num_worker_per_gpu"):
        raise UserError(f"{place}.persistent_workers: true needs num_worker_per_gpu of at least 1")
    if dataset.get("prefetch_mode") == "cuda":
        if not torch.cuda.is_available() or opt["num_gpu"] == 0:
            raise UserError(f"{place}.prefetch_mode: cuda needs a GPU; accepted without one are cpu and ~")
        if not dataset.get("pin_memory"):
            raise UserError(f"{place}.prefetch_mode: cuda needs pin_memory: true")


def _check_val(opt: Options, is_train: bool, model: Callable, notes: list[str]) -> None:
    val = opt["val"]
    check_read_section(
        val, "val", list_kinds(ValOptions), model, notes, ["val_freq", "save_img"] if is_train else ["save_img"]
    )
    metrics = val.get("metrics") or {}
    for name, metric in metrics.items():
        place = f"val.metrics.{name}"
        call = lookup(METRIC_REGISTRY, metric, place)
        check_arguments(metric, place, call, ("type", "better"), ("img", "img1", "img2"), notes)  # img1 in old forks
        if not one_of("higher", "lower").accepts(metric.get("better", "higher")):
            raise UserError(f"{place}.better: expected one of higher, lower, got {short(metric['better'])}")
    best = val.get("save_best")
    if best and best not in metrics:
        accepted = ", ".join(map(str, metrics)) or "none"
        raise UserError(f"val.save_best: {best} is not in val.metrics; accepted are {accepted}")
    if not is_train:
        val.setdefault("suffix", None)


def _check_train(opt: Options, model: Callable, notes: list[str]) -> None:
    train = opt["train"]
    optimisers = [key for key in train if str(key).startswith("optim_")]
    losses = [key for key in train if str(key).endswith("_opt")]
    schema = list_kinds(TrainOptions) | dict.fromkeys(optimisers, DICT) | dict.fromkeys(losses, or_none(DICT))
    check_read_section(train, "train", schema, model, notes, ["total_iter", "optim_g", "scheduler"])
    for key in losses:
        if train[key]:
            place = f"train.{key}"
            call = lookup(LOSS_REGISTRY, train[key], place)
            check_arguments(train[key], place, call, notes=notes, others=find_popped_keys(model))
    _check_tlw(opt, train)
    _check_uncertainty(opt, train)
    if not overrides(model, "get_optimizer", "setup_optimizers"):  # else what it takes is its own affair
        for key in optimisers:
            check_optimizer(train[key], f"train.{key}")
    if not overrides(model, "setup_schedulers"):
        check_scheduler(train["scheduler"], train["total_iter"])
    if train.get("accumulation_steps", 1) > 1 and train.get("use_amp") == "fp16":
        raise UserError("train.accumulation_steps: with use_amp the scale of fp16 changes in between; accepted is bf16")
    wandb = opt["logger"].get("wandb") or {}
    if wandb.get("project") and not opt["logger"]["use_tb_logger"]:
        raise UserError("logger.wandb.project: needs use_tb_logger: true")
    _check_step(model)


def _check_step(model: Callable) -> None:
    """The training calls a model's methods as BasicSR's does; some repositories have signatures of their own."""
    if not inspect.isclass(model):
        return
    for method, arguments in (("feed_data", 1), ("optimize_parameters", 1), ("update_learning_rate", 1), ("save", 2)):
        try:
            inspect.signature(getattr(model, method)).bind(None, *range(arguments))
        except (TypeError, AttributeError) as error:
            raise UserError(
                f"model_type: {model.__name__}.{method} can't be called as BasicSR's training does ({error}): it needs "
                "the training loop of its own repository"
            ) from error


def _check_tlw(opt: Options, train: Options) -> None:
    """The parts of TLW need each other."""
    pixel_type = (train.get("pixel_opt") or {}).get("type")
    if opt["model_type"] != "TLWModel":
        if pixel_type == "TLWLoss":
            raise UserError("train.pixel_opt.type: TLWLoss needs model_type: TLWModel (and base_model, if not SRModel)")
        return
    if pixel_type != "TLWLoss":
        raise UserError(f"train.pixel_opt.type: {short(pixel_type)}; accepted with model_type: TLWModel is TLWLoss")
    check_section(train.get("tlw") or {}, "train.tlw", TLW)
    weights = train["pixel_opt"].get("weights", "learned")
    if weights != "learned":
        for section, place, key in (
            (opt, "", "network_w"),
            (opt["path"], "path.", "pretrain_network_w"),
            (train, "train.", "optim_w"),
            (train["pixel_opt"], "train.pixel_opt.", "distance"),
        ):
            if key in section:
                raise UserError(f"{place}{key}: not used with train.pixel_opt.weights: {weights}; delete it")
        return
    if "network_w" not in opt:
        raise UserError("network_w: missing; TLWModel needs the weighting network, such as {type: TLWWeightNet}")
    if "optim_w" not in train:
        raise UserError(
            "train.optim_w: missing; TLWModel needs the weighting network's optimiser, such as {type: Adam, lr: 1e-4}"
        )
    distance = train["pixel_opt"].get("distance")
    if distance is not None:
        place = "train.pixel_opt.distance"
        check_arguments(distance, place, lookup(LOSS_REGISTRY, distance, place))


def _check_uncertainty(opt: Options, train: Options) -> None:
    """The parts of the uncertainty baseline need each other."""
    pixel_type = (train.get("pixel_opt") or {}).get("type")
    if opt["model_type"] != "UncertaintyModel":
        if pixel_type == "UncertaintyLoss":
            raise UserError("train.pixel_opt.type: UncertaintyLoss needs model_type: UncertaintyModel")
        return
    if pixel_type != "UncertaintyLoss":
        raise UserError(
            f"train.pixel_opt.type: {short(pixel_type)}; accepted with model_type: UncertaintyModel is UncertaintyLoss"
        )
    if "network_u" not in opt:
        raise UserError("network_u: missing; UncertaintyModel needs the head, such as {type: UncertaintyHead}")
    check_section(
        train.get("uncertainty") or {}, "train.uncertainty", list_kinds(UncertaintyOptions), ["stage_one_iter"]
    )
    factor = opt["network_u"].get("upscale")
    if factor is not None and factor != opt.get("scale"):
        raise UserError(f"network_u.upscale: {short(factor)} does not fit scale: {opt.get('scale')}")
