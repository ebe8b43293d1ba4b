"""The sections of a YAML: every option that this package or BasicSR's loops read, its values and its meaning.

The checks and ``docs/options.md`` are made from these classes. Options of networks, losses, distances and metrics are
the parameters of their own classes and functions.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from tlw_basicsr.core.arguments import POSITIVE, STR, Kind, is_number, or_none, whole
from tlw_basicsr.registry import BASICSR, OTHER, OURS
from tlw_basicsr.util.kinds import FOLDER_NAME, NAMES, SUFFIX, TEMPLATE

# numpy's seeds end at 2^32 - 1, and a rank and a worker are added
SEED = or_none(whole(0, 4_000_000_000))
GPUS = Kind(
    "a whole number of at least 0, or auto",
    lambda v: v == "auto" or whole(0).accepts(v),
    {"anyOf": [whole(0).schema, {"const": "auto"}]},
)
# YAML's 5e3 is 5000.0
ITERATIONS = Kind(
    "a whole number above 0", lambda v: is_number(v) and v > 0 and v == int(v), {"type": "integer", "minimum": 1}
)
ROOT = Kind(
    "text, or a list of texts",
    lambda v: STR.accepts(v) or (NAMES.accepts(v) and bool(v)),
    {"anyOf": [STR.schema, {**NAMES.schema, "minItems": 1}]},
)
DECAY = Kind(
    "a number in [0, 1)", lambda v: is_number(v) and 0 <= v < 1, {"type": "number", "minimum": 0, "exclusiveMaximum": 1}
)


@dataclass(kw_only=True)
class TopOptions:
    """The top of the file."""

    name: Annotated[str, FOLDER_NAME, "name of the experiment and of its folder"]
    model_type: Annotated[str, "registered model; `TLWModel` trains `base_model` with TLW"]
    base_model: Annotated[str, "registered model with a pixel loss, for `TLWModel`"] = "SRModel"
    scale: Annotated[int, whole(1), "factor of the super-resolution; needed where a data set or network needs it"]
    num_gpu: Annotated[int | str, GPUS, "GPUs of this process; 0 is the CPU, auto takes all that are visible"]
    manual_seed: Annotated[int | None, SEED, "seed of all random numbers; ~ draws one"] = None
    deterministic: Annotated[
        bool, "torch's deterministic algorithms: slower on GPUs, and an operation without one is an error"
    ] = False
    plugins: Annotated[
        list[str] | None, or_none(NAMES), "modules to import, which register further parts with BasicSR"
    ] = None
    datasets: Annotated[dict, "sections `train`, `val`, `val_2`, …; for testing `test`, `test_1`, …"]
    network_g: Annotated[dict, "the SR network; further `network_…` as the model needs them"]
    path: Annotated[dict, "checkpoints to start from"]
    train: Annotated[dict, "options of a training"]
    val: Annotated[dict | None, "options of the validation; a test needs it"] = None
    logger: Annotated[dict, "what a training logs and saves"]
    dist_params: Annotated[dict | None, "backend and port of a launcher"] = None
    find_unused_parameters: Annotated[bool, "passed to DistributedDataParallel"] = False


@dataclass(kw_only=True)
class LoaderOptions:
    """What the loader of any data set reads."""

    name: Annotated[str, FOLDER_NAME, "name in the log, and of the folder of saved images"]
    type: Annotated[str, "registered data set"]
    use_shuffle: Annotated[bool, "(train)"] = True
    batch_size_per_gpu: Annotated[int, whole(1), "(train) samples in a batch"]
    num_worker_per_gpu: Annotated[int, whole(0, 1024), "(train) processes that load"]
    dataset_enlarge_ratio: Annotated[int, whole(1), "(train) how often an epoch goes through the images"] = 1
    prefetch_mode: Annotated[Literal["cpu", "cuda"] | None, "(train) load ahead"] = None
    num_prefetch_queue: Annotated[int, whole(1), "(train) batches that `cpu` loads ahead"] = 1
    pin_memory: Annotated[bool, "page-locked memory, which a GPU reads faster"] = False
    persistent_workers: Annotated[bool, "(train) keep the loading processes from epoch to epoch"] = False


@dataclass(kw_only=True)
class ImageOptions(LoaderOptions):
    """Data sets of image files, ours and BasicSR's."""

    dataroot_gt: Annotated[str, "folder of HR images, or an LMDB"]
    io_backend: Annotated[dict, "`{type: disk}` or `{type: lmdb}`"]
    meta_info_file: Annotated[str | None, "text file with an image name at the start of each line"] = None
    cache: Annotated[
        str | None,
        "(train) folder for decoded images, which are read from there; for BicubicSRDataset and PairedImageDataset",
    ] = None
    gt_size: Annotated[int | None, or_none(whole(1)), "(train) side of the random HR crop, a multiple of the scale"]
    use_hflip: Annotated[bool, "(train) flip at random"] = False
    use_rot: Annotated[bool, "(train) turn by 90 degrees at random"] = False


@dataclass(kw_only=True)
class BicubicSROptions(ImageOptions):
    """``BicubicSRDataset``: LR is made from HR on the fly. With ``gt_size: ~`` the whole image is taken."""

    mod_crop: Annotated[
        int | None, or_none(whole(1)), "(val, test) HR is cut to a multiple of it; ~ is the scale, 28 the paper's"
    ] = None
    quantize_lq: Annotated[bool, "LR of 8 bits, the field's protocol; false: the bare result, the paper's"] = True


@dataclass(kw_only=True)
class BasicSROptions(ImageOptions):
    """BasicSR's data sets, such as ``PairedImageDataset``; those of forks may take lists of folders."""

    dataroot_gt: Annotated[str | list, ROOT, "folder of HR images, or an LMDB"]
    dataroot_lq: Annotated[str | list, ROOT, "folder of LR images, or an LMDB"]
    filename_tmpl: Annotated[str, TEMPLATE, "LR's name from HR's, such as {}x4"] = "{}"
    color: Annotated[str | None, "y for one channel, Y of YCbCr"] = None
    mean: Annotated[list | None, "subtracted from the images"] = None
    std: Annotated[list | None, "the images are divided by it"] = None


DATASET_SECTIONS = {OURS: BicubicSROptions, BASICSR: BasicSROptions, OTHER: LoaderOptions}  # by a class's origin


@dataclass(kw_only=True)
class TrainOptions:
    """``train``; further losses ``…_opt`` and optimisers ``optim_…`` as the model needs them."""

    total_iter: Annotated[float, ITERATIONS, "number of iterations"]
    warmup_iter: Annotated[
        float,
        Kind("a whole number", lambda v: is_number(v) and v == int(v), {"type": "integer"}),
        "iterations in which the learning rate rises from 0; -1 turns that off",
    ] = -1
    ema_decay: Annotated[
        float, DECAY, "decay of the average of the SR network, `params_ema`; 0 turns the average off"
    ] = 0
    optim_g: Annotated[dict, "optimiser of the SR network, `{type: Adam, lr: …}`: any of `torch.optim` by its name"]
    optim_w: Annotated[dict, "optimiser of the weighting network, likewise"]
    scheduler: Annotated[dict, "BasicSR's `MultiStepLR` and `CosineAnnealingRestartLR`, or any of torch's by its name"]
    pixel_opt: Annotated[dict | None, "the pixel loss; `TLWLoss` with `model_type: TLWModel`"]
    tlw: Annotated[dict | None, "options of `TLWModel`, see `train.tlw`"] = None
    uncertainty: Annotated[dict, "options of `UncertaintyModel`, see `train.uncertainty`"]
    rehearse: Annotated[bool, "try one iteration and one validation before the training; throw them away"] = True
    use_amp: Annotated[Literal[False, "bf16", "fp16"], "autocast of the training step; the loss is scaled for fp16"] = (
        False
    )
    use_channels_last: Annotated[bool, "networks' weights in channels-last order"] = False
    use_compile: Annotated[
        Literal[False, True, "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
        "`torch.compile` of the networks; a mode of it (`reduce-overhead`: CUDA graphs) for the SR network",
    ] = False
    use_tf32: Annotated[bool, "TensorFloat-32 in matrix products (GPUs)"] = False
    accumulation_steps: Annotated[int, whole(1), "iterations to a step of every optimiser"] = 1
    clip_grad_norm: Annotated[float | None, or_none(POSITIVE), "largest norm of an optimiser's gradient"] = None
    guard: Annotated[bool, "refuse steps in which a number is not finite"] = True
    max_bad_steps: Annotated[int, whole(1), "steps in a row that may be refused"] = 10
    init_g: Annotated[
        Literal["default", "paper"], "`paper`: convolutions of the SR network start from N(0, 0.02), by the seed"
    ] = "default"


@dataclass(kw_only=True)
class UncertaintyOptions:
    """``train.uncertainty``."""

    stage_one_iter: Annotated[int, whole(0), "iterations in which the head learns; then it is frozen"]
    features: Annotated[str, "the module of `network_g` whose input the head gets"] = "upsample"


@dataclass(kw_only=True)
class ValOptions:
    """``val``."""

    val_freq: Annotated[float, ITERATIONS, "(train) iterations from one validation to the next"]
    save_img: Annotated[bool, "save the SR images"]
    suffix: Annotated[str | None, SUFFIX, "suffix of the images' names; ~ is the experiment's name"] = None
    pbar: Annotated[bool, "a progress bar, on a terminal"] = True
    metrics: Annotated[dict | None, "`NAME: {type: …, better: higher or lower}`, by registered names"] = None
    save_best: Annotated[str | None, "a name in `metrics`: the best networks by it become `net_…_best.pth`"] = None
    patience: Annotated[
        int | None, or_none(whole(1)), "(train) validations without a new best by `save_best` that end it; ~ for never"
    ] = None


@dataclass(kw_only=True)
class LoggerOptions:
    """``logger``."""

    print_freq: Annotated[float, ITERATIONS, "iterations from one line of the log to the next"]
    save_checkpoint_freq: Annotated[float, ITERATIONS, "iterations from one checkpoint to the next"]
    keep_checkpoints: Annotated[
        int | None, or_none(whole(1)), "how many iterations' files are kept, beside the best; ~ for all"
    ] = None
    use_tb_logger: Annotated[bool, "write for TensorBoard"]
    wandb: Annotated[dict | None, "`{project: NAME, resume_id: ~}`; needs `use_tb_logger`"] = None


@dataclass(kw_only=True)
class DistOptions:
    """``dist_params``."""

    backend: Annotated[str | None, "backend of torch.distributed; ~: nccl, or gloo without a GPU"] = None
    port: Annotated[int | None, or_none(whole(1)), "port of the first process, for slurm"] = None
