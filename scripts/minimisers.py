"""Where a weighted pixel loss has its minimum, on data: the figure of docs/RESULTS.md, "Why it can't be much".

    python scripts/minimisers.py --photographs BSDS500/train BSDS500/test --out docs/results_minimisers

The SR network is a table that fits every pixel it is asked for: the LR neighbourhood of a pixel chooses one of some
groups, and the table holds what is added to bicubic for each group and place in the LR pixel. Many pixels share a cell,
so its values of x scatter, and its best constant is their median by L1 and their mean by MSE. Every loss trains the
same table; where its cells end between the two is what a weighting has done. Grey images, ×4; D is 1 − SSIM.
Writes OUT.png and OUT.csv.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tlw_basicsr import TLW, LDLWeights, PSPLWeights, SSIMDistance, TLWWeightNet
from tlw_basicsr.data.bicubic import imresize
from tlw_basicsr.data.images import read_8bit
from tlw_basicsr.pictures import pyplot, save
from tlw_basicsr.tools.report import csv_text
from tlw_basicsr.util.errors import run
from tlw_basicsr.util.files import write_text

SCALE, SIDE, BATCH = 4, 96, 8
ENOUGH = 2000  # pixels of a cell that is looked at
K = 0.5


def control(**weights: object) -> TLW:
    """A weighting without learning at a constant k."""
    return TLW(**weights, k_start=K, k_end=K)  # pyright: ignore[reportArgumentType]


LOSSES: dict[str, tuple[str, Callable[[], nn.Module | None]]] = {
    "L1": ("L1", lambda: None),
    "MSE": ("MSE", lambda: None),
    "random": ("L1, random weights", lambda: control(weights="random")),
    "error": ("L1, error's weights", lambda: control(weights="error")),
    "LDL": ("L1, LDL's weights", lambda: control(weights=LDLWeights())),
    "PSPL": ("L1, PSPL's weights", lambda: control(weights=PSPLWeights(alpha=1e-9))),
    "TLW": (
        "L1+TLW",
        lambda: TLW.from_preset(
            "economy", SSIMDistance(), net_w=TLWWeightNet(1, 16, prior="error"), k_start=K, k_end=K
        ),
    ),
}


class Photographs:
    """Grey photographs, bicubic of their LR images, and the group of every LR pixel."""

    def __init__(self, folders: list[Path], groups: int, count: int) -> None:
        paths = sorted(path for folder in folders for path in folder.iterdir())[:: max(1, 400 // count)]
        grey = [cv2.cvtColor(read_8bit(path), cv2.COLOR_BGR2GRAY) for path in paths]
        grey = [image if image.shape[0] < image.shape[1] else image.T for image in grey]
        height, width = (min(image.shape[i] for image in grey) // SCALE * SCALE for i in (0, 1))
        hr = [np.ascontiguousarray(image[:height, :width]) for image in grey]
        lr = [imresize(image, 1 / SCALE) for image in hr]
        self.hr, self.lr, self.base = (
            torch.from_numpy(np.stack(images)).float()[:, None] / 255
            for images in (hr, lr, [imresize(image, SCALE) for image in lr])
        )
        around = F.unfold(F.pad(self.lr, [1] * 4, mode="reflect"), 3).transpose(1, 2)
        around = (around - around.mean(2, keepdim=True)).reshape(-1, 9)
        draw = torch.Generator().manual_seed(0)
        sample = around[torch.randperm(len(around), generator=draw)[:40_000]].numpy()
        stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 30, 1e-4)
        cv2.setRNGSeed(0)
        _, _, centres = cv2.kmeans(sample, groups, None, stop, 1, cv2.KMEANS_PP_CENTERS)  # pyright: ignore[reportCallIssue, reportArgumentType]
        nearest = torch.cat([torch.cdist(part, torch.from_numpy(centres)).argmin(1) for part in around.split(50_000)])
        group = nearest.view(len(hr), 1, height // SCALE, width // SCALE)
        place = torch.arange(SCALE**2).view(SCALE, SCALE).repeat(height // SCALE, width // SCALE)
        whole = group.repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3)
        self.cell, self.cells = whole * SCALE**2 + place, groups * SCALE**2

    def batch(self, iteration: int) -> tuple[Tensor, Tensor, Tensor]:
        """Bicubic, cells and x of the patches of an iteration, the same for every loss: (N, 1, side, side)."""
        draw = torch.Generator().manual_seed(iteration)
        ends = (len(self.hr), self.hr.shape[2] - SIDE + 1, self.hr.shape[3] - SIDE + 1)
        places = torch.stack([torch.randint(end, (BATCH,), generator=draw) for end in ends], dim=1).tolist()
        parts = [
            [images[n, :, y : y + SIDE, x : x + SIDE] for n, y, x in places]
            for images in (self.base, self.cell, self.hr)
        ]
        base, cell, hr = (torch.stack(part) for part in parts)
        return base, cell, hr


def train(photographs: Photographs, name: str, iterations: int) -> Tensor:
    """The table that a loss ends with: (cells,)."""
    torch.manual_seed(0)
    table = nn.Parameter(torch.zeros(photographs.cells))
    average = table.detach().clone()
    loss_of = LOSSES[name][1]()
    optimizer = torch.optim.Adam([table], 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for iteration in range(iterations):
        base, cell, gt = photographs.batch(iteration)
        sr = base + table[cell]
        if isinstance(loss_of, TLW):
            loss = loss_of(sr, gt, iteration, sr_ema=base + average[cell])
        else:
            loss = F.l1_loss(sr, gt) if name == "L1" else F.mse_loss(sr, gt)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.lerp_(table.detach(), 0.01)
    return average


def main() -> None:
    """Train the tables, compare their cells with medians and means, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True, help="figure and CSV, without their suffixes")
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--count", type=int, default=100, help="photographs, evenly chosen of 400")
    args = parser.parse_args()
    torch.set_num_threads(1)
    photographs = Photographs(args.photographs, args.groups, args.count)
    cells, rest = photographs.cell.flatten(), (photographs.hr - photographs.base).flatten()
    order = torch.argsort(cells, stable=True)
    parts = rest[order].split(torch.bincount(cells, minlength=photographs.cells).tolist())
    chosen = [i for i, part in enumerate(parts) if len(part) >= ENOUGH]
    median, mean = (torch.stack([f(parts[i]) for i in chosen]) for f in (torch.median, torch.mean))
    rows = []
    figure, axes = pyplot().subplots(
        1, len(LOSSES), figsize=(2.5 * len(LOSSES), 3), sharex=True, sharey=True, layout="constrained"
    )
    for axis, (name, (label, _)) in zip(axes, LOSSES.items(), strict=True):
        table = train(photographs, name, args.iterations)
        values = table[chosen]
        across, up = (255 * (v - median) for v in (mean, values))
        share = ((across * up).sum() / across.square().sum()).item()
        errors = (rest - table[cells]).abs()
        mse = errors.square().mean().item()
        rows.append(
            {"loss": label, "share": share, "l1": 255 * errors.mean().item(), "psnr": -10 * float(np.log10(mse))}
        )
        print(rows[-1], flush=True)
        limit = float(np.percentile(across.abs(), 99))
        axis.plot(across, up, ".", ms=3, color="#0072b2", alpha=0.5)
        axis.plot([-limit, limit], [0, 0], color="0.4", lw=1)
        axis.plot([-limit, limit], [-limit, limit], color="0.4", lw=1, ls="--")
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), title=f"{label}\n{share:.0%} of the way")
        axis.set_xlabel("mean − median")
    axes[0].set_ylabel("the loss's minimum − median\n(levels of 255)")
    figure.suptitle("Minimum of each cell: the median (solid) by L1, the mean (dashed) by MSE; weights move it between")
    save(figure, args.out.with_suffix(".png"), 90)
    write_text(csv_text(rows), args.out.with_suffix(".csv"))


if __name__ == "__main__":
    run(main)
