"""What one TLW iteration costs: ours against plain L1 and against the published call pattern, in one process.

The published pattern (arXiv:2301.10575's implementation) is built here from its description: two forwards of the SR
network, the features of x computed for every distance, 16 passes through VGG-16 with S = 3. Rounds are interleaved.
VGG's weights are random: they cost the same. Example:

  python scripts/benchmark_speed.py --network edsr --batch 4 --patch 192 --rounds 3
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tlw_basicsr  # noqa: I001, F401  comes first, see its compat.py
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from basicsr.utils.registry import ARCH_REGISTRY
from tlw_basicsr.errors import UserError, run
from tlw_basicsr.functional import mix, relaxed_bernoulli
from tlw_basicsr.losses.distance_loss import LPIPSDistance
from tlw_basicsr.losses.tlw_loss import TLWLoss

SAMPLES = 3
NETWORKS = {
    "edsr": {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 64, "num_block": 16, "upscale": 4},
    "rrdb": {"type": "RRDBNet", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 64, "num_block": 23, "scale": 4},
    "rcan": {"type": "RCAN", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 64, "num_group": 10, "num_block": 20,
             "upscale": 4},
}  # fmt: skip


def build_sr(name: str) -> nn.Module:
    """The SR network ×4."""
    if name == "hat":
        try:
            from spandrel.architectures.HAT import HAT
        except ImportError:
            raise UserError("--network hat: needs spandrel; pip install spandrel") from None
        return HAT(
            upscale=4, embed_dim=96, depths=(6,) * 4, num_heads=(6,) * 4, window_size=7, compress_ratio=3,
            squeeze_factor=30, conv_scale=0.01, overlap_ratio=0, mlp_ratio=4, upsampler="pixelshuffle",
            resi_connection="1conv", img_range=1.0,
        )  # fmt: skip
    options = dict(NETWORKS[name])
    return ARCH_REGISTRY.get(options.pop("type"))(**options)


class Bench:
    """The networks, a batch, and one iteration of each kind."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.bf16 = torch.device(args.device), args.dtype == "bf16"
        generator = torch.Generator().manual_seed(0)
        self.gt = torch.rand(args.batch, 3, args.patch, args.patch, generator=generator).to(self.device)
        self.lq = nn.functional.interpolate(self.gt, scale_factor=0.25, mode="area")
        self.net_g = build_sr(args.network).to(self.device)
        self.net_w = ARCH_REGISTRY.get("TLWWeightNet")().to(self.device)
        self.distance = LPIPSDistance("vgg", weights="random").to(self.device)
        if args.channels_last:
            for net in (self.net_w, self.distance):
                net.to(memory_format=torch.channels_last)
        self.loss = TLWLoss(self.distance, num_samples=SAMPLES)
        self.loss.chunk = args.chunk
        self.optim_g = torch.optim.Adam(self.net_g.parameters(), 1e-4)
        self.optim_w = torch.optim.Adam(self.net_w.parameters(), 1e-4)
        self.calls = 0

    def light(self) -> Any:
        """Autocast of the distance and the weighting network with ``--dtype bf16``."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    def step_g(self, loss: Tensor) -> None:
        """One step on θ."""
        self.optim_g.zero_grad()
        loss.backward()
        self.optim_g.step()

    def step_w(self, loss: Tensor) -> None:
        """One step on φ."""
        self.optim_w.zero_grad()
        loss.backward()
        self.optim_w.step()

    def l1(self) -> None:
        """A plain L1 iteration."""
        self.step_g((self.net_g(self.lq) - self.gt).abs().mean())

    def published(self) -> None:
        """The published call pattern, fp32."""
        d, gt = self.distance, self.gt
        x = 2 * gt - 1

        def distance(a: Tensor) -> Tensor:
            return d((a + 1) / 2, gt)  # the features of x once more

        with torch.no_grad():
            sr = 2 * self.net_g(self.lq) - 1
        w = relaxed_bernoulli(self.net_w((sr + 1) / 2, gt))
        x_w, x_1w = mix(sr, x, w)
        self.step_w((torch.log(distance(x_w).abs() + 1e-3) - torch.log(distance(x_1w).abs() + 1e-3)).mean())
        sr = 2 * self.net_g(self.lq) - 1
        with torch.no_grad():
            w = self.net_w((sr + 1) / 2, gt)
        above = below = 0
        for _ in range(SAMPLES):
            with torch.no_grad():
                ws = relaxed_bernoulli(w)
                x_w, x_1w = mix(sr, x, ws)
                r = distance(x_1w) / (distance(x_w).abs() + 1e-3)
            e = (ws * (sr - x).abs()).mean((1, 2, 3))
            above, below = above + r * torch.exp(-e), below + r
        self.step_g(-torch.log(above / below).mean())

    def tlw(self, importance: bool, interval: int) -> None:
        """An iteration as TLWModel runs it."""
        self.loss.importance = importance
        sr = self.net_g(self.lq)
        fixed = sr.detach()
        with self.light():
            distance = self.loss.distance_to(self.gt)
            if self.calls % interval == 0:
                self.step_w(self.loss.weight_loss(fixed, self.gt, self.net_w(fixed, self.gt), distance))
            with torch.no_grad():
                w = self.net_w(fixed, self.gt)
            loss = self.loss(sr, self.gt, w, distance)
        self.step_g(loss)
        self.calls += 1

    def exact(self) -> None:
        """``preset: exact``."""
        self.tlw(True, 1)

    def fast(self) -> None:
        """``preset: fast``: two iterations, of which one has an E step; the time is halved by the caller."""
        self.calls = 0
        self.tlw(False, 2)
        self.tlw(False, 2)


def timed(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(work: Callable[[], None], device: torch.device) -> float:
    """MiB of tensors that one call holds at its peak beyond those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


def flops(work: Callable[[], None]) -> float:
    """Floating-point operations of one call, in units of 10⁹."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


def parts(bench: Bench) -> dict[str, Callable[[], None]]:
    """The parts of an exact iteration."""
    with torch.no_grad():
        sr = bench.net_g(bench.lq)
        w = bench.net_w(sr, bench.gt)
    x = 2 * bench.gt - 1

    def weights() -> None:
        with bench.light():
            bench.step_w(bench.net_w(sr, bench.gt).square().mean())
            with torch.no_grad():
                bench.net_w(sr, bench.gt)

    def distances() -> None:
        with bench.light():
            d = bench.loss.distance_to(bench.gt)
            mixture = mix(2 * sr - 1, x, w.clone().requires_grad_())
            (d(mixture[0], x) - d(mixture[1], x)).mean().backward()
            with torch.no_grad():
                for _ in range(2 * SAMPLES):
                    d(x, x)

    return {"SR network": bench.l1, "weighting network": weights, "distance": distances}


def vgg_speed(bench: Bench) -> float:
    """10⁹ operations a second of VGG-16's forward alone."""

    @torch.no_grad()
    def forward() -> None:
        with bench.light():
            bench.distance.trunk(bench.gt)

    work = flops(forward)
    return work / median(timed(forward, bench.device) for _ in range(5))


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=[*NETWORKS, "hat"], default="edsr", help="SR network, ×4")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--patch", type=int, default=192, help="side of the HR patches")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the distance and weights")
    parser.add_argument("--channels-last", action="store_true", help="of the distance and the weighting network")
    parser.add_argument("--chunk", type=int, help="samples that go through the distance at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    multiple = 28 if args.network == "hat" else 4
    if args.patch % multiple:
        raise UserError(f"--patch: {args.patch} is not a multiple of {multiple}, which {args.network} ×4 needs")
    bench = Bench(args)
    kinds = {"l1": bench.l1, "published": bench.published, "exact": bench.exact, "fast": bench.fast}
    share = {"fast": 2}  # iterations in one call
    for work in tqdm(kinds.values(), desc="warm-up", disable=None):
        work()
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in tqdm(range(args.rounds), desc="rounds", disable=None):
        for name, work in kinds.items():
            seconds[name].append(timed(work, bench.device) / share.get(name, 1))
    medians = {name: median(values) for name, values in seconds.items()}
    operations = {name: flops(work) / share.get(name, 1) for name, work in kinds.items()}
    memory = {name: peak_memory(work, bench.device) for name, work in kinds.items()}
    split = {}
    for name, work in parts(bench).items():
        work()
        split[name] = {"s": median(timed(work, bench.device) for _ in range(args.rounds)), "gflop": flops(work)}
    split["other"] = {"s": medians["exact"] - sum(part["s"] for part in split.values()), "gflop": 0.0}
    speed = vgg_speed(bench)
    ratios = {
        "published/exact": medians["published"] / medians["exact"],
        "published/fast": medians["published"] / medians["fast"],
        "exact/l1": medians["exact"] / medians["l1"],
        "fast/l1": medians["fast"] / medians["l1"],
        "exact/counted bound": medians["exact"] / (operations["exact"] / speed),
    }
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    machine = f"{platform.machine()}, {gpu}, torch {torch.__version__}"
    print(f"\n{args.network} ×4, batch {args.batch}, HR {args.patch}², {args.device} {args.dtype} ({machine})\n")
    print("| iteration | median (s) | to L1 | GFLOP | peak memory (MiB) |\n|---|---:|---:|---:|---:|")
    for name in kinds:
        row = f"{medians[name]:.3f} | {medians[name] / medians['l1']:.2f} | {operations[name]:.0f} | {memory[name]:.0f}"
        print(f"| {name} | {row} |")
    print("\n| part of exact | s | GFLOP |\n|---|---:|---:|")
    for name, part in split.items():
        print(f"| {name} | {part['s']:.3f} | {part['gflop']:.0f} |")
    bound = operations["exact"] / speed
    print(f"\nVGG-16 forward alone: {speed:.0f} GFLOP/s; at that speed exact would take {bound:.3f} s")
    print(", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    if args.json:
        figures = {"median_s": medians, "ratio": ratios, "gflop": operations, "peak_mib": memory, "split": split}
        figures |= {"vgg_gflop_per_s": speed, "machine": machine, "arguments": {**vars(args), "json": str(args.json)}}
        args.json.write_text(json.dumps(figures, indent=2), "utf-8")


if __name__ == "__main__":
    run(main)
