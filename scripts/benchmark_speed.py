"""What an iteration costs: TLW against plain L1 and against the published call pattern, interleaved in one process.

TLW is the object that trains (``tlw_basicsr.TLW``), by its presets. The published pattern (arXiv:2301.10575's
implementation) is built here from its description: two forwards of the SR network, the features of x computed for every
distance, 16 passes through VGG-16 with S = 3. VGG's weights are random: they cost the same. With ``--guard`` BasicSR's
models are timed instead: its own SRModel, then SRModel and TLWModel as they train here, with and without the guard.
With ``--yaml`` whole trainings are, as ``tlw train`` runs them: data loading, logging and all, started in turn.
Examples:

  python scripts/benchmark_speed.py --network edsr --batch 4 --patch 192 --rounds 5
  python scripts/benchmark_speed.py --network rrdb --batch 2 --patch 128 --kinds l1 economy
  python scripts/benchmark_speed.py --guard --rounds 20
  python scripts/benchmark_speed.py --yaml EDSR_L1.yml EDSR_L1TLW.yml --rounds 3
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import tlw_basicsr  # noqa: F401  comes first, see its compat.py

# isort: split

import torch
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from tlw_basicsr import TLW, LPIPSDistance, TLWWeightNet
from tlw_basicsr.core.functional import relaxed_bernoulli
from tlw_basicsr.models import build_model
from tlw_basicsr.tools.report import markdown_table
from tlw_basicsr.util.errors import UserError, run

SAMPLES = 3
NETWORKS = {
    "edsr": {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 64, "num_block": 16, "upscale": 4},
    "rrdb": {"type": "RRDBNet", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 64, "num_block": 23, "scale": 4},
    "swinir": {"type": "SwinIR", "upscale": 4, "in_chans": 3, "img_size": 48, "window_size": 8, "img_range": 1.0,
               "depths": [6] * 4, "embed_dim": 60, "num_heads": [6] * 4, "mlp_ratio": 2,
               "upsampler": "pixelshuffledirect", "resi_connection": "1conv"},
    "rcan": {"type": "RCAN", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 64, "num_group": 10, "num_block": 20,
             "upscale": 4},
    "hat": {"type": "TLWHAT", "embed_dim": 96, "depths": [6] * 4, "num_heads": [6] * 4, "window_size": 7,
            "compress_ratio": 3, "squeeze_factor": 30, "conv_scale": 0.01, "overlap_ratio": 0, "mlp_ratio": 4,
            "upscale": 4},
}  # fmt: skip
PRESETS = ("exact", "fast", "economy")
Work = Callable[[], None]


def published(
    net_g: nn.Module, net_w: nn.Module, d: nn.Module, lq: Tensor, gt: Tensor, k: float, step_w: Work
) -> tuple[Tensor, Tensor]:
    """L_w, whose gradient ``step_w`` has used, and L_SR of an iteration by the published call pattern."""
    x = 2 * gt - 1

    def distance(a: Tensor) -> Tensor:
        return d((a + 1) / 2, gt)  # the features of x once more

    def mixtures(w: Tensor, sr: Tensor) -> tuple[Tensor, Tensor]:
        return w * x + (1 - w) * sr, (1 - w) * x + w * sr

    with torch.no_grad():
        sr = 2 * net_g(lq) - 1
    x_w, x_1w = mixtures(relaxed_bernoulli(net_w((sr + 1) / 2, gt, k)), sr)
    l_w = (torch.log(distance(x_w).abs() + 1e-3) - torch.log(distance(x_1w).abs() + 1e-3)).mean()
    l_w.backward()
    step_w()
    sr = 2 * net_g(lq) - 1
    with torch.no_grad():
        w = net_w((sr + 1) / 2, gt, k)
    above = below = torch.zeros(())
    for _ in range(SAMPLES):
        with torch.no_grad():
            ws = relaxed_bernoulli(w)
            x_w, x_1w = mixtures(ws, sr)
            r = distance(x_1w) / (distance(x_w).abs() + 1e-3)
        e = (ws * (sr - x).abs()).mean((1, 2, 3))
        above, below = above + r * torch.exp(-e), below + r
    return l_w, -torch.log(above / below).mean()


class Kind:
    """One kind of iteration, of which ``period`` make a round: its E steps are spread over them."""

    def __init__(self, iterate: Work, period: int = 1) -> None:
        self.iterate, self.period = iterate, period
        self.seconds: list[float] = []  # of every iteration
        self.rounds: list[float] = []  # mean of every round

    def round(self, device: torch.device) -> None:
        """Time one round."""
        times = [time_call(self.iterate, device) for _ in range(self.period)]
        self.seconds += times
        self.rounds.append(mean(times))

    def whole_round(self) -> None:
        """A round, untimed."""
        for _ in range(self.period):
            self.iterate()

    @property
    def price(self) -> float:
        """Seconds of an iteration, E steps shared among all: the median over the rounds."""
        return median(self.rounds)

    @property
    def slowest(self) -> float:
        """95th percentile of single iterations."""
        return quantiles(self.seconds, n=20)[-1] if len(self.seconds) > 1 else self.seconds[0]


class Bench:
    """The networks, a batch, and the iterations."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        generator = torch.Generator().manual_seed(0)
        self.gt = torch.rand(args.batch, 3, args.patch, args.patch, generator=generator).to(self.device)
        self.lq = nn.functional.interpolate(self.gt, scale_factor=0.25, mode="area")
        options = dict(NETWORKS[args.network])
        self.net_g = ARCH_REGISTRY.get(options.pop("type"))(**options).to(self.device)
        if args.compile:
            self.net_g.compile(mode=args.compile)
        self.optim_g = torch.optim.Adam(self.net_g.parameters(), 1e-4)
        self.distance = LPIPSDistance("vgg", weights="random").to(self.device)
        self.net_w = TLWWeightNet().to(self.device)
        self.optim_w = torch.optim.Adam(self.net_w.parameters(), 1e-4)
        self.low = torch.autocast(self.device.type, torch.bfloat16, enabled=args.dtype == "bf16", cache_enabled=False)
        self.use_amp = "bf16" if args.dtype == "bf16" else False
        self.use_graphs = False if args.no_graphs else None

    def step_g(self, loss: Tensor) -> None:
        """One step on θ."""
        self.optim_g.zero_grad()
        loss.backward()
        self.optim_g.step()
        torch.compiler.cudagraph_mark_step_begin()

    def forward(self) -> Tensor:
        """x̂, under autocast with ``--dtype bf16`` on a GPU, as mixed precision trains."""
        with self.low if self.device.type == "cuda" else torch.autocast("cpu", enabled=False):
            return self.net_g(self.lq)

    def l1(self) -> None:
        """A plain L1 iteration."""
        self.step_g((self.forward() - self.gt).abs().mean())

    def tlw(self, **options: Any) -> Kind:
        """The iterations of a TLW object."""
        tlw = TLW.from_preset(distance=self.distance, use_amp=self.use_amp, use_graphs=self.use_graphs, **options)
        tlw.to(self.device)
        return Kind(lambda: self.step_g(tlw(self.forward(), self.gt, t=0)), tlw.weight_interval)

    def published(self) -> None:
        """The published call pattern, fp32."""
        self.optim_w.zero_grad()
        losses = published(self.net_g, self.net_w, self.distance, self.lq, self.gt, 0.3, self.optim_w.step)
        self.step_g(losses[1])

    def kinds(self, names: list[str]) -> dict[str, Kind]:
        """The iterations of these names."""
        made = {"l1": lambda: Kind(self.l1, 4), "published": lambda: Kind(self.published)}
        made |= {"error": lambda: Kind(self.control("error")), "random": lambda: Kind(self.control("random"))}
        return {name: made[name]() if name in made else self.tlw(preset=name) for name in names}

    def control(self, weights: Any) -> Work:
        """An iteration of a control without learning."""
        tlw = TLW(weights=weights, use_graphs=self.use_graphs)
        return lambda: self.step_g(tlw(self.forward(), self.gt, t=0))


def build_models(args: argparse.Namespace) -> dict[str, Kind]:
    """BasicSR's own SRModel, then SRModel and TLWModel as they train here, with and without the guard."""
    batch = Bench(args)
    kinds = {}
    rows = {"BasicSR's own SRModel": ("SRModel", None), "SRModel": ("SRModel", True), "TLWModel": ("TLWModel", True)}
    rows |= {f"{name}, guard: false": (name, False) for name in ("SRModel", "TLWModel")}
    for row, (name, guard) in rows.items():
        train: dict[str, Any] = {
            "guard": bool(guard), "ema_decay": 0.999, "total_iter": 10**6, "optim_g": {"type": "Adam", "lr": 1e-4},
            "scheduler": {"type": "MultiStepLR", "milestones": []}, "pixel_opt": {"type": "L1Loss"},
        }  # fmt: skip
        if name == "TLWModel":
            train["tlw"] = {"preset": "economy", "k_unit": "iter", "use_graphs": batch.use_graphs}
            train["pixel_opt"] = {"type": "TLWLoss", "distance": {"type": "LPIPSDistance", "weights": "random"}}
        network = dict(NETWORKS[args.network])
        build = SRModel if guard is None else build_model
        model = build({
            "name": "benchmark", "model_type": name, "scale": 4, "num_gpu": int(args.device == "cuda"),
            "is_train": True, "dist": False, "rank": 0, "world_size": 1, "path": {}, "datasets": {"train": {}},
            "network_g": network, "train": train,
        })  # fmt: skip
        counter = iter(range(1, 10**9))

        def iterate(model: Any = model, counter: Any = counter) -> None:
            model.feed_data({"lq": batch.lq, "gt": batch.gt})
            model.optimize_parameters(next(counter))

        kinds[row] = Kind(iterate, 8 if name == "TLWModel" else 4)
    return kinds


def time_training(yaml: Path, iterations: int) -> float:
    """Seconds of an iteration of ``tlw train``: by its log, without the start and the first eight iterations."""
    changes = [f"train:total_iter={8 + iterations}", "logger:print_freq=8", "logger:use_tb_logger=false"]
    command = [sys.executable, "-m", "tlw_basicsr", "train", str(yaml), "--force_yml", "name=benchmark_speed", *changes]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{yaml}: {done.stderr.strip().splitlines()[-1]}")
    folder = Path("experiments", "benchmark_speed")
    (log,) = (file.read_text("utf-8") for file in folder.glob("train_*.log"))
    shutil.rmtree(folder)
    folder.with_name(f".{folder.name}.lock").unlink(missing_ok=True)
    lines = re.findall(r"^(\S+ \S+) INFO: \[.*iter: +([\d,]+),", log, re.M)
    times = {int(n.replace(",", "")): datetime.strptime(at, "%Y-%m-%d %H:%M:%S,%f") for at, n in lines}
    return (times[8 + iterations] - times[8]).total_seconds() / iterations


def compare_trainings(yamls: list[Path], iterations: int, rounds: int) -> dict[str, dict[str, float]]:
    """What an iteration of each YAML costs, to the first."""
    seconds: dict[str, list[float]] = {yaml.stem: [] for yaml in yamls}
    for _ in tqdm(range(rounds), desc="rounds", disable=None):
        for yaml in yamls:
            seconds[yaml.stem].append(time_training(yaml, iterations))
    first = seconds[yamls[0].stem]
    rows = {}
    for name, values in seconds.items():
        ratio = median(ours / plain for ours, plain in zip(values, first, strict=True))
        rows[name] = {"s": median(values), "ratio": ratio}
        print(f"{name}: {rows[name]['s']:.3f} s an iteration, {ratio:.3f} of the first")
    return rows


def time_call(work: Work, device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_memory(work: Work, device: torch.device) -> float:
    """MiB of tensors that a round holds at its peak beyond those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


def count_operations(work: Work) -> float:
    """Floating-point operations of a round, in units of 10⁹."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=[*NETWORKS], default="edsr", help="SR network, ×4")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--patch", type=int, default=192, help="side of the HR patches")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of TLW; on a GPU of θ too")
    parser.add_argument("--tf32", action="store_true", help="TensorFloat-32 in matrix products and convolutions")
    parser.add_argument("--no-graphs", action="store_true", help="TLW without CUDA graphs")
    parser.add_argument("--compile", metavar="MODE", help="torch.compile of the SR network, such as reduce-overhead")
    parser.add_argument("--rounds", type=int, default=3)
    choices = ["l1", "error", "random", "published", *PRESETS]
    default = ["l1", "published", *PRESETS]
    parser.add_argument("--kinds", nargs="+", choices=choices, default=default, help="iterations to time")
    parser.add_argument("--guard", action="store_true", help="time BasicSR's models with and without the guard instead")
    parser.add_argument("--yaml", type=Path, nargs="+", help="time whole trainings of these YAMLs instead")
    parser.add_argument("--iterations", type=int, default=48, help="of a training of --yaml; a multiple of 8")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if args.yaml:
        if args.iterations < 8 or args.iterations % 8:
            raise UserError(f"--iterations: expected a multiple of 8, got {args.iterations}")
        rows = compare_trainings(args.yaml, args.iterations, args.rounds)
        if args.json:
            args.json.write_text(json.dumps({"rows": rows}, indent=2), "utf-8")
        return
    multiple = {"hat": 28, "swinir": 32}.get(args.network, 4)
    if args.patch % multiple:
        raise UserError(f"--patch: {args.patch} is not a multiple of {multiple}, which {args.network} ×4 needs")
    if args.tf32:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    bench = Bench(args)
    kinds = build_models(args) if args.guard else bench.kinds(list(dict.fromkeys(["l1", *args.kinds])))
    for kind in tqdm(kinds.values(), desc="warm-up", disable=None):
        kind.whole_round()
    for _ in tqdm(range(args.rounds), desc="rounds", disable=None):
        for kind in kinds.values():
            kind.round(bench.device)
    first = next(iter(kinds.values()))
    rows = {}
    for name, kind in kinds.items():
        # round by round, which a change of the machine's speed leaves alone
        ratio = median(ours / plain for ours, plain in zip(kind.rounds, first.rounds, strict=True))
        rows[name] = {
            "s": kind.price, "ratio": ratio, "median_s": median(kind.seconds), "p95_s": kind.slowest,
            "images_per_s": args.batch / kind.price, "gflop": count_operations(kind.whole_round) / kind.period,
            "peak_mib": measure_memory(kind.whole_round, bench.device),
        }  # fmt: skip
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    machine = f"{platform.machine()}, {gpu}, torch {torch.__version__}"
    print(f"\n{args.network} ×4, batch {args.batch}, HR {args.patch}², {args.device} {args.dtype} ({machine})\n")
    headings = ["s", "to the first", "median (s)", "95th percentile (s)", "images/s", "GFLOP", "peak memory (MiB)"]
    cells = [
        [name, *(f"{value:.{digits}f}" for value, digits in zip(row.values(), (3, 3, 3, 3, 2, 0, 0), strict=True))]
        for name, row in rows.items()
    ]
    print("\n".join(markdown_table(["iteration", *headings], cells, 1)))
    figures: dict[str, Any] = {"rows": rows, "machine": machine, "arguments": {**vars(args), "json": str(args.json)}}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2), "utf-8")


if __name__ == "__main__":
    run(main)
