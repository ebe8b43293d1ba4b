"""Train and measure the cells of the paper's comparison that are missing, and write them down.

For each scale: table_x4.md and .csv, plots, and a page that compares the images, compare_x4.html.

tlw tables --networks EDSR VDSR --scales 4 --data datasets --out tables

A short run on a CPU, with small networks and a distance that needs no download:

tlw tables --networks EDSR --losses L1 L1TLW --scales 4 --sets Set5 Set14 --data datasets \\
    --train-data datasets/BSDS200 --out tables --iters 1000 --no-lpips --distance '{type: SSIMDistance}' \\
    --force_yml network_g:num_feat=16 network_g:num_block=4 datasets:train:gt_size=96 \\
    datasets:train:batch_size_per_gpu=8 train:optim_g:lr=2e-3

It may be stopped at any time: what is complete is not done again. The test sets are folders of --data; those that are
missing are left out.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tlw_basicsr.commands import add_arguments, parser_of
from tlw_basicsr.engine.options import read_options
from tlw_basicsr.losses.tlw_loss import PAPER_DISTANCE
from tlw_basicsr.tools import tables
from tlw_basicsr.tools.comparison import Result, compare, of_network
from tlw_basicsr.tools.evaluation import BICUBIC
from tlw_basicsr.tools.experiment import load_trained
from tlw_basicsr.tools.recipes import CELLS
from tlw_basicsr.tools.tables import TEST_SETS, Cell, Run, Variant
from tlw_basicsr.util.errors import UserError
from tlw_basicsr.util.yaml_options import load_yaml

NETWORKS = ("EDSR", "VDSR", "RCAN", "HAT")  # the paper's; RRDB can be named
PAPER_LOSSES = ("L1", "MSE", "L1TLW", "MSETLW", "L1Uncertainty")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("tables", __doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    losses = "such as L1 MSE L1TLW MSETLW L1Uncertainty L1Random L1Error; default: the paper's"
    parser.add_argument("--losses", nargs="+", help=losses)
    variant = "NAME LOSS KEY=VALUE …: one more row, LOSS with further options, such as L1TLWfast L1TLW "
    variant += "train:tlw:preset=fast; may be given again"
    parser.add_argument("--variant", nargs="+", action="append", default=[], metavar="WORD", help=variant)
    parser.add_argument("--scales", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--sets", nargs="+", default=list(TEST_SETS), help="names of test sets")
    parser.add_argument("--data", type=Path, default=Path("datasets"), help="folder of the test sets")
    parser.add_argument("--train-data", type=Path, help="folder of HR images; default: the recipes'")
    parser.add_argument("--out", type=Path, default=Path("tables"), help="folder of the results")
    parser.add_argument("--iters", type=int, help="iterations, to scale the trainings down")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--distance", help="options of D, such as '{type: SSIMDistance}'; default: the paper's")
    parser.add_argument("--force_yml", nargs="+", default=[], help="options of every cell that has their section")
    parser.add_argument("--no-lpips", action="store_true", help="no LPIPS, and the last network instead of the best")
    add_arguments(parser, "--perceptual", "--grey-as-y")
    return parser.parse_args(argv)


def choose_cells(args: argparse.Namespace) -> list[Cell]:
    """The cells that the arguments name and for which there are recipes; prints which are left out."""
    known = sorted({network for network, _, _ in CELLS.values()})
    for network in args.networks:
        if network not in known:
            raise UserError(f"--networks: {network}; accepted are {', '.join(known)}")
    pairs = list(product(dict.fromkeys(args.networks), dict.fromkeys(args.scales)))
    available = {pair: sorted(loss for n, loss, s in CELLS.values() if (n, s) == pair) for pair in pairs}
    named = ", ".join(dict.fromkeys(args.networks))
    for scale in args.scales:
        if not any(available[pair] for pair in pairs if pair[1] == scale):
            raise UserError(f"--scales: no recipe of {named} is for ×{scale}")
    variants = [Variant(loss, loss) for loss in dict.fromkeys(args.losses or PAPER_LOSSES)]
    variants += [Variant(name, loss, tuple(forced)) for name, loss, *forced in args.variant]
    everything = sorted({loss for losses in available.values() for loss in losses})
    for variant in variants:
        if (args.losses or variant.forced) and variant.loss not in everything:
            raise UserError(f"--losses: {named} have no {variant.loss}; accepted are {', '.join(everything)}")
    cells = []
    for (network, scale), losses in available.items():
        absent = [v.name for v in variants if v.loss not in losses]
        if args.losses and losses and absent:
            print(f"Left out, no recipe: {network} ×{scale} with {', '.join(absent)}")
        chosen = [v for v in variants if v.loss in losses]
        cells += [Cell(network, v, scale, seed) for v in chosen for seed in dict.fromkeys(args.seeds)]
    return cells


def write_comparison(run: Run, cells: Sequence[Cell], scale: int) -> Path:
    """Write the page that compares the images of the first test set, by the networks of the first seed."""
    results = [Result(BICUBIC, BICUBIC)]
    for cell in cells:
        if cell.scale == scale and cell.seed == cells[0].seed:
            opt = read_options(str(run.out / "options" / f"{cell.name}.yml"))
            trained = load_trained(opt, tables.find_network(run, cell))
            results.append(of_network(f"{cell.network} {cell.variant.name}", trained, opt, scale=scale))
    path, distance = run.out / f"compare_x{scale}.html", PAPER_DISTANCE if run.with_lpips else None
    compare(results, run.data / run.sets[0], scale, path, run.distance or distance)
    return path


def stop(number: int, _: Any) -> None:
    """A signal's handler: end, and let the training save and end."""
    sys.exit(128 + number)


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, measure, write the tables."""
    args = parse(argv)
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, stop)
    for words in args.variant:
        if len(words) < 2 or not words[0].replace("-", "").isalnum():
            raise UserError(f"--variant {' '.join(words)}: expected NAME LOSS KEY=VALUE …, NAME of letters and digits")
    if args.iters is not None and args.iters < 1:
        raise UserError(f"--iters: expected a number of at least 1, got {args.iters}")
    distance = load_yaml(args.distance, "--distance") if args.distance else None
    if args.train_data and not args.train_data.is_dir():
        raise UserError(f"--train-data: {args.train_data} is not a folder")
    run = Run(
        args.out, args.data, args.train_data, args.sets, args.iters, distance, args.force_yml, not args.no_lpips,
        args.grey_as_y, args.perceptual,
    )  # fmt: skip
    if run.missing:
        print(f"Left out, not in {run.data}: {', '.join(run.missing)}")
    cells = choose_cells(args)
    tables.check_forced(run, cells)
    missing = [cell for cell in cells if not tables.is_trained(run, cell)]
    for cell in missing:
        tables.check_cell(run, cell)
    for folder in ("cells", "options"):
        (run.out / folder).mkdir(parents=True, exist_ok=True)
    scales = sorted({cell.scale for cell in cells})
    for scale in scales:  # before the trainings: it needs all of the test sets, and LPIPS's weights
        tables.measure(run, f"bicubic_x{scale}", scale, None)
    iterations = {cell: int(tables.cell_options(run, cell)["train"]["total_iter"]) for cell in missing}
    print(f"{len(cells)} cells, {len(missing)} to train, {sum(iterations.values()):,} iterations", flush=True)
    with tqdm(total=sum(iterations.values()), unit="it", disable=not missing, mininterval=1) as bar:
        done = 0
        for cell in missing:
            bar.set_description(cell.name)
            tables.train(run, cell, lambda iteration, done=done: bar.update(done + iteration - bar.n))
            done += iterations[cell]
            bar.update(done - bar.n)
    for cell in tqdm(cells, desc="measure", unit="cell", leave=False):
        tables.measure(run, cell.name, cell.scale, tables.find_network(run, cell))
    for scale in scales:
        paths = tables.write_tables(run, cells, scale)
        print(f"\n{paths[0].read_text('utf-8')}")
        paths.append(write_comparison(run, cells, scale))
        print("Written: " + ", ".join(map(str, paths)))
