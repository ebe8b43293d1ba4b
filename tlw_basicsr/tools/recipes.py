"""YAML files to start from, as text: the cells of the paper's comparison, their tests, and recipes of practice.

``recipe("EDSR_L1TLW_x4")`` is a training of the comparison, ``recipe("test_EDSR_L1TLW_x4")`` its test,
``recipe("recipe_EDSR_x4")`` what one would start a training of today from; :func:`list_recipes` names them all.
"""

from dataclasses import dataclass
from itertools import product
from math import lcm
from pathlib import Path

from tlw_basicsr.util.errors import UserError
from tlw_basicsr.util.kinds import suggestion

NETWORKS = {
    "EDSR": """\
  type: EDSR
  num_in_ch: 3
  num_out_ch: 3
  num_feat: 64
  num_block: 16
  upscale: {scale}
  res_scale: 1
  img_range: 2.  # the network sees [-1, 1], as in the paper
  rgb_mean: [0.5, 0.5, 0.5]
""",
    "VDSR": """\
  type: TLWVDSR
  num_feat: 64
  num_block: 10
  upscale: {scale}
""",
    "RCAN": """\
  type: TLWRCAN  # upscales by one PixelShuffle, which BasicSR's RCAN does not
  num_feat: 64
  num_group: 10
  num_block: 20
  squeeze_factor: 16
  upscale: {scale}
""",
    "HAT": """\
  type: TLWHAT  # the paper's small one
  embed_dim: 96
  depths: [6, 6, 6, 6]
  num_heads: [6, 6, 6, 6]
  window_size: 7
  compress_ratio: 3
  squeeze_factor: 30
  conv_scale: 0.01
  overlap_ratio: 0
  mlp_ratio: 4
  upscale: {scale}
""",
    "RRDB": """\
  type: RRDBNet
  num_in_ch: 3
  num_out_ch: 3
  num_feat: 64
  num_block: 23
  num_grow_ch: 32
  scale: {scale}
""",
}

PLAIN_LOSSES = {"L1": "L1Loss", "MSE": "MSELoss"}
TLW_LOSSES = {"L1TLW": "l1", "MSETLW": "mse"}
UNCERTAINTY = "L1Uncertainty"
CONTROLS = {"L1Random": "random", "L1Error": "error"}
FOUR = (*PLAIN_LOSSES, *TLW_LOSSES)
CELLS = {  # network: (scales, losses); the paper's cells, RRDB, and two networks' baselines and controls
    "EDSR": ((2, 3, 4), (*FOUR, UNCERTAINTY, *CONTROLS)),
    "VDSR": ((2, 3, 4), FOUR),
    "RCAN": ((2, 3, 4), (*FOUR, UNCERTAINTY)),
    "HAT": ((4,), ("L1", "L1TLW", UNCERTAINTY)),
    "RRDB": ((4,), FOUR),
}
DESCRIPTIONS = {
    "L1": "L1",
    "MSE": "MSE",
    "L1TLW": "L1 and Trainable Loss Weights (TLW)",
    "MSETLW": "MSE and Trainable Loss Weights (TLW)",
    "L1Uncertainty": "L1 and the uncertainty baseline",
    "L1Random": "L1 and random weights, a control for TLW",
    "L1Error": "L1 and weights in proportion to the error, a control for TLW",
}
MODELS = {
    "L1TLW": "TLWModel  # TLW: instead of SRModel",
    "MSETLW": "TLWModel  # TLW: instead of SRModel",
    "L1Uncertainty": "UncertaintyModel",
    "L1Random": "TLWModel",
    "L1Error": "TLWModel",
}


@dataclass(frozen=True)
class Tiles:
    """Training data of a network: side of the tiles, batch size, iterations of about 100 epochs of DIV2K."""

    side: int = 512
    batch: int = 1
    iterations: int = 500_000


TILES = {"HAT": Tiles(side=336, batch=4, iterations=480_000)}

TRAIN = """\
# {network} ×{scale} with {described}.
# `tlw options {cell}` prints this file; copy it under another name to change it.
# Data: cut the HR images into tiles with
#   tlw prepare --gt datasets/DIV2K/DIV2K_train_HR --out datasets/DIV2K/tiles{tiles} --crop-size {tiles}
name: {name}
model_type: {model}
scale: {scale}
num_gpu: auto  # all that are visible; 0 is the CPU
manual_seed: 0

datasets:
  train:
    name: DIV2K
    type: BicubicSRDataset  # LR is made from HR on the fly
    dataroot_gt: datasets/DIV2K/tiles{tiles}/HR
    io_backend:
      type: disk
    gt_size: ~  # the whole tile; a number for random crops
    use_hflip: false
    use_rot: false
    quantize_lq: false  # the paper's LR, not rounded to 8 bits
    num_worker_per_gpu: 4
    batch_size_per_gpu: {batch}
    dataset_enlarge_ratio: 1
    prefetch_mode: ~

  val:  # by the paper's protocol
    name: Set5
    type: BicubicSRDataset
    dataroot_gt: datasets/Set5
    io_backend:
      type: disk
    mod_crop: {mod_crop}
    quantize_lq: false

{network_options}
path:
  pretrain_network_g: ~
  strict_load_g: true
  resume_state: ~

train:
  ema_decay: 0
  init_g: paper  # convolutions start from N(0, 0.02), the same for every loss
  optim_g:
    type: Adam
    lr: !!float 1e-4
    weight_decay: 0
    betas: [0.5, 0.999]
{optim_w}  scheduler:
    type: MultiStepLR
    milestones: []  # a constant learning rate
    gamma: 0.5
  total_iter: {iterations}  # about 100 epochs
  warmup_iter: -1  # no warm up

  # losses
{losses}
val:
  val_freq: !!float 5e3
  save_img: false
  save_best: lpips_vgg  # kept as net_g_best.pth
  metrics:
    lpips_vgg:
      type: tlw_lpips
      net: vgg
      better: lower
    psnr_y:
      type: tlw_psnr_y

logger:
  print_freq: 100
  save_checkpoint_freq: !!float 5e3
  use_tb_logger: true
  wandb:
    project: ~
    resume_id: ~

dist_params:
  port: 29500
"""

PLAIN_PIXEL = """\
  pixel_opt:
    type: {loss}
    loss_weight: 1.0
    reduction: mean
"""

TLW_PIXEL = """\
  pixel_opt:
    type: TLWLoss  # TLW: instead of {plain}
    base: {base}
    stochastic: true  # the variant with sampled weights
    num_samples: 3
    loss_weight: 1.0
    distance:  # D, which tells the weighting network which pixels matter
      type: LPIPSDistance
      net: vgg
      linear: false  # the paper's D has no linear heads
      weights: ~  # torchvision's VGG-16; a path, or random
"""

CONTROL_PIXEL = """\
  pixel_opt:
    type: TLWLoss
    base: l1
    weights: {weights}  # not learned
    loss_weight: 1.0
"""

UNCERTAINTY_PIXEL = """\
  pixel_opt:
    type: UncertaintyLoss
    loss_weight: 1.0
  uncertainty:
    stage_one_iter: {half}  # then the head is frozen
    features: upsample  # the head gets the input of this module
"""

NETWORK_W = """
network_w:  # TLW: the weighting network
  type: TLWWeightNet
  num_feat: 64
  init: paper
"""

NETWORK_U = """
network_u:  # predicts the log-variance map
  type: UncertaintyHead
  num_in_ch: 64
  num_feat: 64
  upscale: {scale}
"""

TLW_SCHEDULE = """\
  tlw:  # TLW: k = k_start + (k_end - k_start)(1 - exp(-t / k_decay)) is the mean of the weights
    k_start: 0.3
    k_end: 0.9
    k_decay: 100
    k_unit: epoch
"""

OPTIM_W = """\
  optim_w:  # TLW: the weighting network's own optimiser
    type: Adam
    lr: !!float 1e-4
    betas: [0.5, 0.999]
"""

TEST = """\
# {network} ×{scale} trained with {described}: tables and images of the benchmarks.
# `tlw options {cell}` prints this file; copy it under another name to change it.
name: {name}
model_type: SRModel  # the weighting network is not needed after training
scale: {scale}
num_gpu: auto
manual_seed: 0

datasets:
{datasets}
{network_options}
path:
  pretrain_network_g: experiments/{train_name}/models/net_g_best.pth
  strict_load_g: true

val:
  save_img: true
  suffix: ~  # of the images' names; the name above if none is given
  metrics:
    psnr:
      type: calculate_psnr
      crop_border: {scale}
      test_y_channel: true
    ssim:
      type: calculate_ssim
      crop_border: {scale}
      test_y_channel: true
"""

TEST_SET = """\
  test_{number}:
    name: {name}
    type: BicubicSRDataset
    dataroot_gt: datasets/{name}
    io_backend:
      type: disk
"""


def write_losses(loss: str, iterations: int) -> str:
    """The pixel loss and what belongs to it."""
    if loss in PLAIN_LOSSES:
        return PLAIN_PIXEL.format(loss=PLAIN_LOSSES[loss])
    if loss == UNCERTAINTY:
        return UNCERTAINTY_PIXEL.format(half=iterations // 2)
    if loss in CONTROLS:
        return CONTROL_PIXEL.format(weights=CONTROLS[loss]) + TLW_SCHEDULE
    plain = PLAIN_LOSSES[loss.removesuffix("TLW")]
    return TLW_PIXEL.format(base=TLW_LOSSES[loss], plain=plain) + TLW_SCHEDULE


def write_training(network: str, loss: str, scale: int) -> str:
    """The training YAML of one cell of the table."""
    tiles = TILES.get(network, Tiles())
    networks = "network_g:\n" + NETWORKS[network].format(scale=scale)
    if loss in TLW_LOSSES:
        networks += NETWORK_W
    if loss == UNCERTAINTY:
        networks += NETWORK_U.format(scale=scale)
    return TRAIN.format(
        network=network,
        scale=scale,
        described=DESCRIPTIONS[loss],
        cell=f"{network}_{loss}_x{scale}",
        name=f"train_{network}_{loss}_x{scale}",
        model=MODELS.get(loss, "SRModel"),
        tiles=tiles.side,
        batch=tiles.batch,
        iterations=tiles.iterations,
        mod_crop=lcm(28, scale),
        network_options=networks,
        optim_w=OPTIM_W if loss in TLW_LOSSES else "",
        losses=write_losses(loss, tiles.iterations),
    )


def write_test(network: str, loss: str, scale: int) -> str:
    """The test YAML of one cell of the table."""
    sets = [TEST_SET.format(number=i, name=name) for i, name in enumerate(("Set5", "Set14", "BSD100"), 1)]
    return TEST.format(
        network=network,
        scale=scale,
        described=DESCRIPTIONS[loss],
        cell=f"test_{network}_{loss}_x{scale}",
        name=f"test_{network}_{loss}_x{scale}",
        train_name=f"train_{network}_{loss}_x{scale}",
        datasets="\n".join(sets),
        network_options="network_g:\n" + NETWORKS[network].format(scale=scale),
    )


@dataclass(frozen=True)
class Practice:
    """A training that a practitioner would start from: random crops, 8-bit LR, an average of the weights, ``economy``.

    Attributes:
        title: of the header.
        model: ``model_type``, and ``base_model`` where it is not SRModel.
        network: the lines of ``network_g``.
        gt_size: side of the crops of HR.
        batch: samples.
        lr: of the SR network's Adam.
        iterations: of the training.
        scheduler: its lines.
        path: what is known of a start, the lines of ``path``.
    """

    title: str
    model: str
    network: str
    gt_size: int
    batch: int
    lr: str
    iterations: int
    scheduler: str
    path: str = "  pretrain_network_g: ~\n  strict_load_g: true\n"


SWINIR_LIGHT = """\
  type: SwinIR
  upscale: 4
  in_chans: 3
  img_size: 64
  window_size: 8
  img_range: 1.
  depths: [6, 6, 6, 6]
  embed_dim: 60
  num_heads: [6, 6, 6, 6]
  mlp_ratio: 2
  upsampler: pixelshuffledirect
  resi_connection: 1conv
"""
EDSR = """\
  type: EDSR
  num_in_ch: 3
  num_out_ch: 3
  num_feat: 64
  num_block: 16
  upscale: 4
  res_scale: 1
  img_range: 255.
  rgb_mean: [0.4488, 0.4371, 0.4040]
"""
MULTISTEP = "    type: MultiStepLR\n    milestones: {milestones}\n    gamma: 0.5\n"
COSINE = """\
    type: CosineAnnealingRestartLR
    periods: {periods}  # whose sum is total_iter
    restart_weights: {weights}
    eta_min: !!float 1e-7
"""
PRACTICES = {
    "recipe_EDSR_x4": Practice(
        "EDSR ×4, 16 blocks", "TLWModel", EDSR, 192, 16, "2e-4", 300_000, MULTISTEP.format(milestones=[200_000])
    ),
    "recipe_RRDB_x4": Practice(
        "RRDB ×4, the PSNR stage of ESRGAN", "TLWModel", NETWORKS["RRDB"].format(scale=4), 128, 16, "2e-4", 1_000_000,
        COSINE.format(periods=[250_000] * 4, weights=[1, 1, 1, 1]),
    ),
    "recipe_SwinIR_light_x4": Practice(
        "SwinIR light ×4", "TLWModel\nbase_model: SwinIRModel", SWINIR_LIGHT, 256, 16, "2e-4", 500_000,
        MULTISTEP.format(milestones=[250_000, 400_000, 450_000, 475_000]),
    ),
    "recipe_EDSR_finetune_x4": Practice(
        "EDSR ×4, fine-tuned from a pretrained network", "TLWModel", EDSR, 192, 16, "2e-5", 50_000,
        COSINE.format(periods=[50_000], weights=[1]),
        "  pretrain_network_g: pretrained/EDSR_x4.pth  # yours\n  param_key_g: params\n  strict_load_g: true\n",
    ),
}  # fmt: skip

PRACTICE = """\
# {title}, with L1 and Trainable Loss Weights (TLW) at about the price of L1.
# `tlw options {name}` prints this file; copy it under another name to change it.
# Data: cut the HR images into tiles, which load faster than whole images, with
#   tlw prepare --gt datasets/DIV2K/DIV2K_train_HR --out datasets/DIV2K/sub480 --crop-size 480 --step 240
name: {name}
model_type: {model}
scale: 4
num_gpu: auto  # all that are visible; 0 is the CPU
manual_seed: 0

datasets:
  train:
    name: DIV2K
    type: BicubicSRDataset  # LR is made from HR on the fly, of 8 bits; PairedImageDataset reads LR files
    dataroot_gt: datasets/DIV2K/sub480/HR
    io_backend:
      type: disk
    gt_size: {gt_size}  # random crops
    use_hflip: true
    use_rot: true
    num_worker_per_gpu: 6
    batch_size_per_gpu: {batch}
    dataset_enlarge_ratio: 10
    prefetch_mode: ~

  val:
    name: Set5
    type: BicubicSRDataset
    dataroot_gt: datasets/Set5
    io_backend:
      type: disk

network_g:
{network}
path:
{path}  resume_state: ~

train:
  ema_decay: 0.999
  optim_g:
    type: Adam
    lr: !!float {lr}
    weight_decay: 0
    betas: [0.9, 0.99]
  scheduler:
{scheduler}  total_iter: {iterations}
  warmup_iter: -1  # no warm up

  # losses
  pixel_opt:
    type: TLWLoss  # TLW: instead of L1Loss
    base: l1
    loss_weight: 1.0
    distance:  # D, which tells the weighting network which pixels matter
      type: LPIPSDistance
      net: vgg
  tlw:
    preset: economy  # a small weighting network that learns in every eighth iteration, on small crops
    k_start: 0.3
    k_end: 0.9
    k_decay: {decay}  # a third of the training
    k_unit: iter

val:
  val_freq: !!float 5e3
  save_img: false
  save_best: psnr
  metrics:
    psnr:
      type: calculate_psnr
      crop_border: 4
      test_y_channel: true
      better: higher
    ssim:
      type: calculate_ssim
      crop_border: 4
      test_y_channel: true
      better: higher

logger:
  print_freq: 100
  save_checkpoint_freq: !!float 5e3
  keep_checkpoints: 5
  use_tb_logger: true
  wandb:
    project: ~
    resume_id: ~

dist_params:
  backend: nccl
  port: 29500
"""


def write_practice(name: str) -> str:
    """The YAML of a recipe."""
    values = vars(PRACTICES[name])
    return PRACTICE.format(name=name, decay=values["iterations"] // 3, **values)


QUICKSTART = """\
# A small EDSR ×4 that trains in a minute or two on two CPU cores, with {described}.
# `tlw quickstart` runs it, on photographs that come with scikit-image.
name: {name}
model_type: {model}
scale: 4
num_gpu: auto
manual_seed: 0

datasets:
  train:
    name: photographs
    type: BicubicSRDataset
    dataroot_gt: data/train
    io_backend:
      type: disk
    gt_size: 64
    use_hflip: true
    use_rot: true
    num_worker_per_gpu: 0
    batch_size_per_gpu: 8
    dataset_enlarge_ratio: 100

  val:
    name: held_out
    type: BicubicSRDataset
    dataroot_gt: data/held_out
    io_backend:
      type: disk

network_g:
  type: EDSR
  num_in_ch: 3
  num_out_ch: 3
  num_feat: 16
  num_block: 4
  upscale: 4
  res_scale: 1
  img_range: 1.
  rgb_mean: [0.4488, 0.4371, 0.4040]

{network_w}path: {{}}

train:
  ema_decay: 0.99
  optim_g:
    type: Adam
    lr: !!float 2e-3
    betas: [0.9, 0.99]
{optim_w}  scheduler:
    type: CosineAnnealingRestartLR
    periods: [600]
    eta_min: !!float 1e-5
  total_iter: 600

{losses}val:
  val_freq: 300
  save_img: false
  pbar: false
  metrics:
    psnr:
      type: calculate_psnr
      crop_border: 4
      test_y_channel: true

logger:
  print_freq: 100
  save_checkpoint_freq: 100
  use_tb_logger: false
"""
QUICKSTART_TLW = {
    "described": "L1 and Trainable Loss Weights (TLW)",
    "model": "TLWModel",
    "network_w": "",
    "optim_w": "",
    "losses": """\
  pixel_opt:
    type: TLWLoss
    base: l1
    distance:  # light, and needs no weights
      type: SSIMDistance
  tlw:
    preset: economy
    k_start: 0.3
    k_end: 0.9
    k_decay: 300
    k_unit: iter

""",
}
QUICKSTARTS = {
    "quickstart_EDSR_L1_x4": {
        "described": "L1",
        "model": "SRModel",
        "network_w": "",
        "optim_w": "",
        "losses": PLAIN_PIXEL.format(loss="L1Loss") + "\n",
    },
    "quickstart_EDSR_L1TLW_x4": QUICKSTART_TLW,
}


# ------------------------------------------------------------------------------------------------- by name


def list_cells() -> list[tuple[str, str, int]]:
    """Network, loss and scale of every training of the comparison."""
    return [(n, loss, s) for n, (scales, losses) in CELLS.items() for s, loss in product(scales, losses)]


def list_recipes() -> list[str]:
    """The names of all files, those of practice first."""
    cells = [f"{network}_{loss}_x{scale}" for network, loss, scale in list_cells()]
    return [*PRACTICES, *QUICKSTARTS, *cells, *(f"test_{cell}" for cell in cells)]


def recipe(name: str) -> str:
    """The text of the YAML file ``name``; ``train_`` before the name of a training may be there.

    Raises:
        UserError: there is none of that name; the message says which are like it.
    """
    plain = name.removeprefix("train_").removesuffix(".yml")
    if plain not in list_recipes():
        first = ", ".join(list_recipes()[:6])
        raise UserError(
            f"{name}: there is no recipe of this name{suggestion(plain, list_recipes())}; some are {first}; "
            "network, loss and scale are combined, as EDSR_L1TLW_x4 or test_RCAN_MSE_x2"
        )
    if plain in PRACTICES:
        return write_practice(plain)
    if plain in QUICKSTARTS:
        return QUICKSTART.format(name=plain, **QUICKSTARTS[plain])
    network, loss, scale = plain.removeprefix("test_").split("_")
    write = write_test if plain.startswith("test_") else write_training
    return write(network, loss, int(scale.removeprefix("x")))


def list_files() -> dict[Path, str]:
    """The files of the folder ``options`` and their texts; the rest of the comparison differs in a few words."""
    files = {Path("options", "recipes", f"{name}.yml"): recipe(name) for name in PRACTICES}
    files |= {Path("options", "quickstart", f"{name}.yml"): recipe(name) for name in QUICKSTARTS}
    for network, losses in {"EDSR": FOUR, "VDSR": FOUR, "RCAN": FOUR, "HAT": CELLS["HAT"][1]}.items():
        for loss in losses:
            name = f"{network}_{loss}_x4"
            files[Path("options", "train", network, f"train_{name}.yml")] = recipe(name)
    for network in CELLS:
        name = f"test_{network}_L1TLW_x4"
        files[Path("options", "test", network, f"{name}.yml")] = recipe(name)
    return files
