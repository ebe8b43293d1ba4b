"""BasicSR's command line and YAML, read safely and checked against what exists before anything runs."""

import argparse
import ast
import importlib
import inspect
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from basicsr.models import lr_scheduler
from basicsr.utils import set_random_seed
from basicsr.utils.registry import (
    ARCH_REGISTRY,
    DATASET_REGISTRY,
    LOSS_REGISTRY,
    METRIC_REGISTRY,
    MODEL_REGISTRY,
)

from tlw_basicsr.distributed import LAUNCHERS, init_distributed
from tlw_basicsr.errors import UserError, expanded, first_line, short
from tlw_basicsr.kinds import (
    ANY,
    BOOL,
    DICT,
    FOLDER_NAME,
    FRACTION,
    LIST,
    NAMES,
    NUMBER,
    POSITIVE,
    STR,
    SUFFIX,
    TEMPLATE,
    Kind,
    Options,
    check_section,
    describe_parameters,
    is_number,
    lookup,
    one_of,
    or_none,
    whole,
)
from tlw_basicsr.models.tlw_model import PRESETS, with_tlw

OURS = ("basicsr.", "tlw_basicsr.")  # modules that are no plugin's


# ------------------------------------------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also reads ``1e-4`` as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        keys = Counter(key.value for key in scalars if key.tag != "tag:yaml.org,2002:merge")
        for key, times in keys.items():
            if times > 1:
                problem = f"the key {short(key)} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge ``<<``; of a key that comes more than once only the last stays, or merges of merges would explode."""
        super().flatten_mapping(node)
        node.value = list({_identity(key): (key, value) for key, value in node.value}.values())


def _identity(key: yaml.Node) -> Any:
    return (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(text: str, name: str) -> Any:
    """Parse YAML without running code.

    Raises:
        UserError: it is not YAML; the message has the line.
    """
    try:
        return _unshared(yaml.load(text, Loader=_Loader), name)
    except (ValueError, RecursionError, OverflowError) as error:  # a date such as 2020-13-45; ten thousand brackets
        raise UserError(f"{name}: not valid YAML: {type(error).__name__}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}, line {mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{place}: not valid YAML: {problem}") from error


def _unshared(content: Any, name: str) -> Any:
    """``content`` with a copy for every YAML alias: BasicSR takes keys out of sections, which must not be shared.

    Raises:
        UserError: the aliases make more than 100,000 values of it, or an endless one; or it has a number of more than
            1,000 bits, which can't be written.
    """
    count = 0

    def copied(value: Any) -> Any:
        nonlocal count
        count += 1
        if count > 100_000:
            raise UserError(f"{name}: its YAML aliases make more than 100,000 values")
        if isinstance(value, int) and value.bit_length() > 1000:
            raise UserError(f"{name}: it has a number of more than 300 digits")
        if isinstance(value, dict):
            return {key: copied(item) for key, item in value.items()}
        return [copied(item) for item in value] if isinstance(value, list) else value

    return copied(content)


def force_options(opt: Options, entries: list[str]) -> None:
    """Apply ``--force_yml`` entries such as ``train:ema_decay=0.999`` to ``opt``. A value is YAML; so is ``none``.

    The last key of an entry may be new; the sections before it must exist.
    """
    for entry in entries:
        keys, separator, text = entry.partition("=")
        *sections, last = [key.strip() for key in keys.split(":")]
        if not separator or not all([*sections, last]):
            raise UserError(f"--force_yml {entry}: expected key=value or section:key=value")
        place = opt
        for section in sections:
            place = place.get(section)
            if not isinstance(place, dict):
                raise UserError(f"--force_yml {entry}: the options have no section {short(section)}")
        text = text.strip()
        place[last] = None if text.lower() == "none" else load_yaml(text, f"--force_yml {entry}")


def read_options(path: str, forced: Sequence[str] = ()) -> Options:
    """The options of a YAML file with ``forced`` entries applied, not checked yet; its plugins are imported.

    Raises:
        UserError: it can't be read, holds no options, or a plugin can't be imported.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"-opt {path}: is no file")  # of which /dev/zero would never end
        text = Path(path).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"-opt {path}: can't be read as text ({type(error).__name__})") from error
    opt = load_yaml(text, path)
    if not isinstance(opt, dict):
        raise UserError(f"-opt {path}: must hold options, 'key: value', not a {type(opt).__name__}")
    force_options(opt, list(forced))
    if not TOP["plugins"].accepts(opt.get("plugins")):
        raise UserError(f"plugins: expected {TOP['plugins'].text}, got {short(opt['plugins'])}")
    for name in opt.get("plugins") or []:
        _import_plugin(name)
    return opt


def parse_options(root_path: str, is_train: bool = True, argv: list[str] | None = None) -> tuple[Options, Any]:
    """BasicSR's ``parse_options``: the command line and its YAML to the options, checked.

    Args:
        root_path: folder in which ``experiments/`` or ``results/`` is.
        is_train: for ``train.py`` or ``test.py``.
        argv: the command line's arguments, ``sys.argv[1:]`` if None.

    Returns:
        The options, with BasicSR's additions, and the arguments.

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
    check_options(opt, is_train)
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
        dataset.update(phase=key.split("_")[0], scale=opt["scale"])
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


# ------------------------------------------------------------------------------------------------- parts


def check_arguments(
    section: Options, where: str, call: Callable, given: Collection[str] = ("type",), extra: Collection[str] = ()
) -> None:
    """Check options that become keyword arguments of ``call`` against its signature.

    Args:
        section: the options.
        where: their place.
        call: a class or function.
        given: keys of the section that are not arguments.
        extra: parameters that are not options.

    Raises:
        UserError: a key is no parameter, a parameter without default is missing, or a value can't be meant, going by
            the parameter's annotation or default.
    """
    parameters = describe_parameters(call, extra)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(call).parameters.values())
    schema = dict.fromkeys(given, ANY) | {name: option.kind for name, option in parameters.items()}
    required = [name for name, option in parameters.items() if option.default is inspect.Parameter.empty]
    check_section(section, where, schema, required, mentioned(call) if open_ended else ())


@cache
def _literals(module: str) -> frozenset[str]:
    """The string constants in a module's source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError):
        return frozenset()
    return frozenset(n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def mentioned(what: Callable) -> frozenset[str]:
    """The words that the code of a class (and its bases) or function mentions: the options it may read are among them.

    So third-party parts that take BasicSR's ``opt`` are checked for misspelt keys too.
    """
    modules = {c.__module__ for c in inspect.getmro(what)} if inspect.isclass(what) else {what.__module__}
    return frozenset().union(*(_literals(m) for m in modules if m.split(".")[0] not in ("builtins", "torch")))


# ------------------------------------------------------------------------------------------------- checks

TOP = {
    "name": FOLDER_NAME,
    "model_type": STR,
    "base_model": STR,
    "scale": whole(1),
    "num_gpu": Kind("a whole number of at least 0, or auto", lambda v: v == "auto" or whole(0).accepts(v)),
    "manual_seed": or_none(whole(0, 4_000_000_000)),  # numpy takes 2^32 - 1, a rank and a worker are added
    "plugins": or_none(NAMES),
    "datasets": DICT,
    "path": DICT,
    "train": DICT,
    "val": or_none(DICT),
    "logger": DICT,
    "dist_params": or_none(DICT),
    "find_unused_parameters": BOOL,
}
DATASET = {
    "name": FOLDER_NAME,  # of saved images
    "type": STR,
    "dataroot_gt": STR,
    "dataroot_lq": STR,
    "meta_info_file": or_none(STR),
    "io_backend": DICT,
    "filename_tmpl": STR,
    "gt_size": or_none(whole(1)),
    "mod_crop": or_none(whole(1)),
    "quantize_lq": BOOL,
    "use_hflip": BOOL,
    "use_rot": BOOL,
    "use_shuffle": BOOL,
    "batch_size_per_gpu": whole(1),
    "num_worker_per_gpu": whole(0, 1024),
    "dataset_enlarge_ratio": whole(1),
    "prefetch_mode": or_none(one_of("cpu", "cuda")),
    "num_prefetch_queue": whole(1),
    "pin_memory": BOOL,
    "persistent_workers": BOOL,
    "color": or_none(STR),
    "mean": or_none(LIST),
    "std": or_none(LIST),
}
TRAIN = {
    "total_iter": POSITIVE,  # BasicSR writes 1e6 too
    "warmup_iter": NUMBER,
    "ema_decay": Kind("a number in [0, 1)", lambda v: is_number(v) and 0 <= v < 1),
    "use_amp": one_of(False, "bf16", "fp16"),
    "use_channels_last": BOOL,
    "use_compile": BOOL,
    "use_tf32": BOOL,
    "accumulation_steps": whole(1),
    "clip_grad_norm": or_none(POSITIVE),
    "max_bad_steps": whole(1),
    "scheduler": DICT,
    "init_g": one_of("default", "paper"),
    "tlw": or_none(DICT),
    "uncertainty": DICT,
}
TLW = {
    "k_start": FRACTION,
    "k_end": FRACTION,
    "k_decay": POSITIVE,
    "k_unit": one_of("epoch", "iter"),
    "preset": one_of(*PRESETS),
    "importance": BOOL,
    "weight_interval": whole(1),
    "use_amp": one_of(False, "bf16"),
    "use_channels_last": BOOL,
    "distance_chunk": or_none(whole(1)),
    "sync_bn": BOOL,
}
VAL = {
    "val_freq": POSITIVE,
    "save_img": BOOL,
    "pbar": BOOL,
    "suffix": SUFFIX,
    "metrics": or_none(DICT),
    "save_best": or_none(STR),
}
UNCERTAINTY = {"stage_one_iter": whole(0), "features": STR}
LOGGER = {
    "print_freq": POSITIVE,
    "save_checkpoint_freq": POSITIVE,
    "keep_checkpoints": or_none(whole(1)),
    "use_tb_logger": BOOL,
    "wandb": or_none(DICT),
}
SCHEDULERS = {
    "MultiStepLR": lr_scheduler.MultiStepRestartLR,
    "MultiStepRestartLR": lr_scheduler.MultiStepRestartLR,
    "CosineAnnealingRestartLR": lr_scheduler.CosineAnnealingRestartLR,
}


def check_options(opt: Options, is_train: bool) -> None:
    """Check all options against what BasicSR, this package and loaded plugins have.

    Raises:
        UserError: a key is unknown or missing, a value is of the wrong kind, a name is not registered, or options do
            not fit each other. One line that names the key and says what is accepted.
    """
    networks = [key for key in opt if str(key).startswith("network_")]
    schema = TOP | dict.fromkeys(networks, DICT)
    required = ["name", "model_type", "scale", "num_gpu", "datasets", "network_g", "path"]
    required += ["train", "logger"] if is_train else ["val"]
    model = model_class(opt)
    known = mentioned(model)
    check_section(opt, "", schema, required, known)
    check_section(opt.get("dist_params") or {}, "dist_params", {"backend": or_none(STR), "port": or_none(whole(1))})
    for key in networks:
        arch = lookup(ARCH_REGISTRY, opt[key], key)
        check_arguments(opt[key], key, arch)
    _check_factor(opt)
    _check_path(opt, networks, known)
    _check_datasets(opt, is_train)
    if not is_train or opt.get("val"):
        check_section(opt["val"], "val", VAL, ["val_freq", "save_img"] if is_train else ["save_img"], known)
        for name, metric in (opt["val"].get("metrics") or {}).items():
            where = f"val.metrics.{name}"
            check_arguments(metric, where, lookup(METRIC_REGISTRY, metric, where), ("type", "better"), ("img", "img2"))
            check_section(metric, where, {"better": one_of("higher", "lower")}, (), metric)
        best, metrics = opt["val"].get("save_best"), opt["val"].get("metrics") or {}
        if best and best not in metrics:
            accepted = ", ".join(map(str, metrics)) or "none"
            raise UserError(f"val.save_best: {best} is not in val.metrics; accepted are {accepted}")
        if not is_train:
            opt["val"].setdefault("suffix", None)
    if is_train:
        check_section(opt["logger"], "logger", LOGGER, ["print_freq", "save_checkpoint_freq", "use_tb_logger"], known)
        _check_train(opt, model, known)


def _check_factor(opt: Options) -> None:
    """The SR network's factor is the scale, also where it is left to the default of the network's class."""
    section, names = opt["network_g"], ("upscale", "scale", "upscale_factor")
    parameters = inspect.signature(lookup(ARCH_REGISTRY, section, "network_g")).parameters
    defaults = {name: parameters[name].default for name in names if name in parameters}
    for name in names:
        factor = section.get(name)
        if factor is not None and factor != opt["scale"]:
            raise UserError(f"network_g.{name}: {short(factor)} does not fit scale: {opt['scale']}")
        if not section.keys() & set(names) and type(defaults.get(name)) is int and defaults[name] != opt["scale"]:
            raise UserError(
                f"network_g.{name}: missing, and {section['type']}'s default of {defaults[name]} does not fit "
                f"scale: {opt['scale']}"
            )


def model_class(opt: Options) -> type:
    """The class of the model; for TLWModel, of its base model with TLW."""
    model = lookup(MODEL_REGISTRY, opt, "", "model_type")
    if opt["model_type"] != "TLWModel":
        return model
    base = lookup(MODEL_REGISTRY, {"base_model": "SRModel", **opt}, "", "base_model")
    if not has_pixel_loss(base):
        choices = [name for name, kind in MODEL_REGISTRY if has_pixel_loss(kind)]
        raise UserError(f"base_model: {opt['base_model']} has no pixel loss; accepted are {', '.join(sorted(choices))}")
    return with_tlw(base)


def has_pixel_loss(model: type) -> bool:
    """Whether a model class or one of its bases calls ``self.cri_pix``, which is where TLW stands."""
    if not inspect.isclass(model):
        return False
    try:
        return any("self.cri_pix(" in inspect.getsource(c) for c in inspect.getmro(model) if c.__module__ != "builtins")
    except (OSError, TypeError):  # no source to look at; the model itself will tell
        return True


def _check_path(opt: Options, networks: list[str], known: Collection[str]) -> None:
    schema = {"resume_state": or_none(STR), "ignore_resume_networks": or_none(NAMES)}
    for network in networks:
        label = network.removeprefix("network_")
        schema |= {
            f"pretrain_network_{label}": or_none(STR),
            f"strict_load_{label}": or_none(BOOL),
            f"param_key_{label}": or_none(STR),
        }
    schema |= {"strict_load": or_none(BOOL)}
    for beginning, kind in (("pretrain_network_", STR), ("strict_load_", BOOL), ("param_key_", STR)):
        schema |= {key: or_none(kind) for key in known if key.startswith(beginning)}
    check_section(opt["path"], "path", schema)


def _check_datasets(opt: Options, is_train: bool) -> None:
    phases = ("train", "val") if is_train else ("test", "val")
    for key, dataset in opt["datasets"].items():
        where, phase = f"datasets.{key}", str(key).split("_")[0]
        if phase not in phases:
            raise UserError(f"{where}: unknown data set; accepted are {' and '.join(phases)}, also as {phases[1]}_2")
        kind = lookup(DATASET_REGISTRY, dataset, where)
        required = ["name", "type"]
        if phase == "train":
            required += ["batch_size_per_gpu", "num_worker_per_gpu"]
        if kind.__name__ in ("BicubicSRDataset", "PairedImageDataset"):
            required += ["dataroot_gt", "io_backend"]
            if phase == "train":
                required += ["gt_size"]
        if kind.__name__ == "PairedImageDataset":
            required += ["dataroot_lq"] + (["use_hflip", "use_rot"] if phase == "train" else [])
        schema = DATASET | ({"filename_tmpl": TEMPLATE} if kind.__module__.startswith(OURS) else {})
        check_section(dataset, where, schema, required, {*mentioned(kind), "phase", "scale"})
        if "io_backend" in dataset:
            check_section(dataset["io_backend"], f"{where}.io_backend", {"type": one_of("disk", "lmdb")}, ["type"])
        gt_size = dataset.get("gt_size")
        if phase == "train" and gt_size and gt_size % opt["scale"]:
            raise UserError(f"{where}.gt_size: {gt_size} is not a multiple of the scale {opt['scale']}")
        if phase == "train" and "gt_size" in dataset and not gt_size and kind.__name__ != "BicubicSRDataset":
            raise UserError(
                f"{where}.gt_size: expected a whole number of at least 1 for {kind.__name__}, got {short(gt_size)}"
            )
        if dataset.get("persistent_workers") and not dataset.get("num_worker_per_gpu"):
            raise UserError(f"{where}.persistent_workers: true needs num_worker_per_gpu of at least 1")
        if dataset.get("prefetch_mode") == "cuda":
            if not torch.cuda.is_available() or opt["num_gpu"] == 0:
                raise UserError(f"{where}.prefetch_mode: cuda needs a GPU; accepted without one are cpu and ~")
            if not dataset.get("pin_memory"):
                raise UserError(f"{where}.prefetch_mode: cuda needs pin_memory: true")
    if is_train and "train" not in opt["datasets"]:
        raise UserError("datasets.train: missing; a training needs it")


def _check_train(opt: Options, model: type, known: Collection[str]) -> None:
    train = opt["train"]
    optimisers = [key for key in train if str(key).startswith("optim_")]
    losses = [key for key in train if str(key).endswith("_opt")]
    schema = TRAIN | dict.fromkeys(optimisers, DICT) | dict.fromkeys(losses, or_none(DICT))
    check_section(train, "train", schema, ["total_iter", "optim_g", "scheduler"], known)
    for key in optimisers:
        where = f"train.{key}"
        if overrides(model, "get_optimizer", "setup_optimizers") and train[key].get("type") != "Adam":
            continue  # a plugin's own; BasicSR's models know one optimiser
        if train[key].get("type") != "Adam":
            raise UserError(
                f"{where}.type: {short(train[key].get('type'))}; accepted is Adam, BasicSR's only optimiser"
            )
        check_arguments(train[key], where, torch.optim.Adam, extra=("params",))
        if not POSITIVE.accepts(train[key].get("lr", 1e-3)):
            raise UserError(f"{where}.lr: expected {POSITIVE.text}, got {short(train[key]['lr'])}")
    name = train["scheduler"].get("type")
    if isinstance(name, str) and name in SCHEDULERS:
        check_arguments(train["scheduler"], "train.scheduler", SCHEDULERS[name], extra=("optimizer", "last_epoch"))
        if name == "CosineAnnealingRestartLR":
            _check_periods(train["scheduler"], train["total_iter"])
    elif not overrides(model, "setup_schedulers"):
        raise UserError(f"train.scheduler.type: {short(name)}; accepted are {', '.join(SCHEDULERS)}")
    for key in losses:
        if train[key]:
            check_arguments(train[key], f"train.{key}", lookup(LOSS_REGISTRY, train[key], f"train.{key}"))
    if train.get("accumulation_steps", 1) > 1 and train.get("use_amp") == "fp16":
        raise UserError("train.accumulation_steps: with use_amp the scale of fp16 changes in between; accepted is bf16")
    wandb = opt["logger"].get("wandb") or {}
    if wandb.get("project") and not opt["logger"]["use_tb_logger"]:
        raise UserError("logger.wandb.project: needs use_tb_logger: true")
    _check_tlw(opt, train)
    _check_uncertainty(opt, train)


def _check_periods(scheduler: Options, total_iter: float) -> None:
    """The periods of cosine annealing last until the end of the training; BasicSR's class fails where they do not."""
    where, periods, weights = "train.scheduler", scheduler["periods"], scheduler.get("restart_weights", [1])
    if not isinstance(periods, list) or not periods or not all(map(POSITIVE.accepts, periods)):
        raise UserError(f"{where}.periods: expected a list of numbers above 0, got {short(periods)}")
    if not isinstance(weights, list) or len(weights) != len(periods) or not all(map(NUMBER.accepts, weights)):
        raise UserError(
            f"{where}.restart_weights: expected a list of {len(periods)} numbers, one for each of the periods, "
            f"got {short(weights)}"
        )
    if sum(periods) < total_iter:
        raise UserError(f"{where}.periods: their sum, {sum(periods)}, is less than train.total_iter: {total_iter}")


def overrides(model: type, *methods: str) -> bool:
    """Whether a plugin's class in the model's bases has one of the methods of its own."""
    return inspect.isclass(model) and any(
        name in vars(c) for c in inspect.getmro(model) for name in methods if not f"{c.__module__}.".startswith(OURS)
    )


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
        for section, where, key in (
            (opt, "", "network_w"),
            (opt["path"], "path.", "pretrain_network_w"),
            (train, "train.", "optim_w"),
            (train["pixel_opt"], "train.pixel_opt.", "distance"),
        ):
            if key in section:
                raise UserError(f"{where}{key}: not used with train.pixel_opt.weights: {weights}; delete it")
        return
    if "network_w" not in opt:
        raise UserError("network_w: missing; TLWModel needs the weighting network, such as {type: TLWWeightNet}")
    if "optim_w" not in train:
        raise UserError(
            "train.optim_w: missing; TLWModel needs the weighting network's optimiser, such as {type: Adam, lr: 1e-4}"
        )
    if opt["network_w"]["type"] == "TLWWeightNet" and not FRACTION.accepts(opt["network_w"].get("k", 0.3)):
        raise UserError(f"network_w.k: expected {FRACTION.text}, got {short(opt['network_w']['k'])}")
    distance = train["pixel_opt"].get("distance")
    if distance is not None:
        where = "train.pixel_opt.distance"
        check_arguments(distance, where, lookup(LOSS_REGISTRY, distance, where))


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
    check_section(train.get("uncertainty") or {}, "train.uncertainty", UNCERTAINTY, ["stage_one_iter"])
    factor = opt["network_u"].get("upscale")
    if factor is not None and factor != opt["scale"]:
        raise UserError(f"network_u.upscale: {short(factor)} does not fit scale: {opt['scale']}")
