"""Train a small EDSR ×4 with L1 and with L1+TLW on photographs that come with scikit-image, and compare them.

It needs some minutes, but no GPU, data or download. Two photographs are held out of the training. Example:

  tlw quickstart --out quickstart
"""

import subprocess
import sys
import time
from pathlib import Path

import cv2
import skimage.data
from skimage.color import gray2rgb
from tqdm import tqdm

from tlw_basicsr.commands import parser_of
from tlw_basicsr.data.images import write_image
from tlw_basicsr.losses.tlw_loss import complete_economy
from tlw_basicsr.networks import load_network
from tlw_basicsr.pictures import method_figure
from tlw_basicsr.tools.evaluation import BICUBIC, FIELD, evaluate, means, read_pair
from tlw_basicsr.tools.experiment import build_distance, find_k
from tlw_basicsr.tools.recipes import recipe
from tlw_basicsr.util.progress import announce
from tlw_basicsr.util.yaml_options import force_options, load_yaml

TRAIN = ("brick", "camera", "coffee", "coins", "grass", "gravel", "moon", "rocket", "stereo_motorcycle")
HELD_OUT = ("astronaut", "chelsea")
LOSSES = {"L1": "L1", "L1TLW": "L1+TLW"}
NEXT = """
What next, with this result:
  cd {out}
  tlw weights --opt {name}.yml --image data/held_out/chelsea.png --strip   # what it has learned
  tlw infer data/held_out --opt {name}.yml                                 # upscale images
  tlw compare bicubic {plain}.yml {name}.yml --gt data/held_out   # compare.html
"""


def write_photographs(folder: Path) -> None:
    """Write scikit-image's photographs as PNGs into ``train/`` and ``held_out/``."""
    for part, names in (("train", TRAIN), ("held_out", HELD_OUT)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for name in tqdm(names, desc=f"data/{part}", unit="image", leave=False, disable=None):
            image = getattr(skimage.data, name)()
            image = image[0] if isinstance(image, tuple) else image  # the left one of the stereo pair
            image = gray2rgb(image) if image.ndim == 2 else image
            write_image(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), folder / part / f"{name}.png")


def main(argv: list[str] | None = None) -> None:
    """Train both, print the table, draw the weights."""
    parser = parser_of("quickstart", __doc__)
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="folder of the results")
    parser.add_argument("--force_yml", nargs="*", default=[], help="options to set in both trainings")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    announce(f"Writing photographs to {args.out}/data, and measuring bicubic on those held out …")
    write_photographs(out / "data")
    held_out = out / "data/held_out"
    rows = {"bicubic": (means(evaluate({"field": BICUBIC}, held_out, 4))["field"], 0.0)}
    for loss, label in LOSSES.items():
        name = f"quickstart_EDSR_{loss}_x4"
        text = recipe(name)
        (out / f"{name}.yml").write_text(text, "utf-8")
        print(f"\nTraining EDSR ×4 with {label} ({args.out / name}.yml)", flush=True)
        command = [sys.executable, "-m", "tlw_basicsr.train", "-opt", f"{name}.yml"]
        start = time.perf_counter()
        forced = ["--force_yml", *args.force_yml] if args.force_yml else []
        subprocess.run([*command, *forced], cwd=out, check=True)
        seconds = time.perf_counter() - start
        opt = load_yaml(text, name)
        force_options(opt, args.force_yml)
        models = Path(out, "experiments", opt["name"], "models")
        net_g = load_network(opt["network_g"], models / "net_g_latest.pth", "params_ema")
        rows[label] = (means(evaluate({"field": net_g}, held_out, 4))["field"], seconds)

    complete_economy(opt)
    iterations = opt["train"]["total_iter"]
    net_w = load_network(opt["network_w"], Path(models, "net_w_latest.pth"), key="network_w")
    distance = build_distance(opt["train"]["pixel_opt"]["distance"], "train.pixel_opt.distance")
    pair = read_pair(str(held_out / f"{HELD_OUT[-1]}.png"), 4, FIELD)
    picture, title = out / "learned_weights.png", "Weights learned by the quickstart"
    method_figure(net_w, find_k(opt, models, iterations), distance, net_g(pair.lq)[0], pair.gt[0], picture, title)

    print(f"\nHeld-out photographs: {', '.join(HELD_OUT)}; EDSR ×4, {iterations} iterations; Y channel, border 4\n")
    print("| loss    | Y-PSNR (dB) | SSIM   | time (s) |\n|---------|------------:|-------:|---------:|")
    for label, (values, seconds) in rows.items():
        print(f"| {label:7} | {values['psnr_y']:11.2f} | {values['ssim_y']:.4f} | {seconds:8.0f} |")
    print(f"\nThe learned weights: {args.out / picture.name}")
    print(NEXT.format(out=args.out, name=name, plain="quickstart_EDSR_L1_x4"), end="")
    if not all(rows[label][0]["psnr_y"] > rows["bicubic"][0]["psnr_y"] for label in LOSSES.values()):
        sys.exit("A trained network is not better than bicubic.")
