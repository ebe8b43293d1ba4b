"""YAML files to start from: the whole files of ``options/`` and the cells of the paper's comparison.

``recipe("EDSR_L1TLW_x4")`` is a training of the comparison, ``recipe("test_EDSR_L1TLW_x4")`` its test and
``recipe("recipe_EDSR_x4")`` a training for use in practice; :func:`describe_recipes` returns all names. For every
network ``options/train`` has the cell of L1TLW at ×4 as a whole file. The other cells are changes of it.
"""

import re
from math import lcm
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

import yaml

from tlw_basicsr.util.errors import UserError
from tlw_basicsr.util.kinds import Options, suggestion
from tlw_basicsr.util.yaml_options import load_yaml

FOLDER = Path(__file__).parents[1] / "options"
FILES = {path.stem.removeprefix("train_"): path for path in sorted(FOLDER.rglob("*.yml"))}


class Loss(NamedTuple):
    """A loss of the comparison: its title, the changes of ``train.pixel_opt``, and ``model_type``."""

    title: str
    pixel_opt: Options
    model: str = "TLWModel"


_CONTROL = {"type": "TLWLoss", "base": "l1", "loss_weight": 1.0}
_PLAIN = {"loss_weight": 1.0, "reduction": "mean"}
LOSSES = {
    "L1": Loss("L1", {"type": "L1Loss", **_PLAIN}, "SRModel"),
    "MSE": Loss("MSE", {"type": "MSELoss", **_PLAIN}, "SRModel"),
    "L1TLW": Loss("L1 and Trainable Loss Weights (TLW)", {}),
    "MSETLW": Loss("MSE and Trainable Loss Weights (TLW)", {"base": "mse"}),
    "L1Uncertainty": Loss(
        "L1 and the uncertainty baseline", {"type": "UncertaintyLoss", "loss_weight": 1.0}, "UncertaintyModel"
    ),
    "L1Random": Loss("L1 and random weights, a control for TLW", {**_CONTROL, "weights": "random"}),
    "L1Error": Loss("L1 and weights in proportion to the error, a control for TLW", {**_CONTROL, "weights": "error"}),
}
FOUR = ("L1", "MSE", "L1TLW", "MSETLW")
COMPARISON = {  # network: (scales, losses); the paper's cells, RRDB, and the baselines and controls of some networks
    "EDSR": ((2, 3, 4), tuple(LOSSES)),
    "VDSR": ((2, 3, 4), FOUR),
    "RCAN": ((2, 3, 4), (*FOUR, "L1Uncertainty")),
    "HAT": ((4,), ("L1", "L1TLW", "L1Uncertainty")),
    "RRDB": ((4,), FOUR),
}
CELLS = {  # every training of the comparison: its network, loss and scale
    f"{network}_{loss}_x{scale}": (network, loss, scale)
    for network, (scales, losses) in COMPARISON.items()
    for loss in losses
    for scale in scales
}


def describe_recipes() -> dict[str, str]:
    """Return the names of all recipes with a line that says what each is; the files that are no cells come first."""
    cells = {name: f"{network} ×{scale} with {LOSSES[loss].title}" for name, (network, loss, scale) in CELLS.items()}
    cells |= {f"test_{name}": f"the test of {name}" for name in CELLS}
    files = {name: file.read_text("utf-8").splitlines()[1].strip("# .") for name, file in FILES.items()}
    return {name: text for name, text in files.items() if name not in cells} | cells


def recipe(name: str) -> str:
    """Return the YAML text of a recipe; ``train_`` before the name and ``.yml`` after it may be left out."""
    name = name.removeprefix("train_").removesuffix(".yml")
    if name in FILES:
        return FILES[name].read_text("utf-8")
    if name.removeprefix("test_") not in CELLS:
        known = [*describe_recipes()]
        raise UserError(
            f"{name}: there is no recipe of this name{suggestion(name, known)}; some are {', '.join(known[:6])}; "
            "network, loss and scale are combined, as EDSR_L1TLW_x4 or test_RCAN_MSE_x2"
        )
    network, loss, scale = CELLS[name.removeprefix("test_")]
    text = FILES[f"{network}_L1TLW_x4"].read_text("utf-8")
    text = change(text, _changes(loss, scale, load_yaml(text, name)["train"]["total_iter"]))
    if name.startswith("test_"):
        network_g = slice(*find_section(text, "network_g"))
        metrics = {metric: {"crop_border": scale} for metric in ("psnr", "ssim")}
        test = change(FILES["test_EDSR_L1TLW_x4"].read_text("utf-8"), {"scale": scale, "val": {"metrics": metrics}})
        start, end = find_section(test, "network_g")
        test = test[:start] + text[network_g] + test[end:]
        text = test.replace("EDSR_L1TLW", f"{network}_L1TLW").replace("EDSR ×4", f"{network} ×4")
    text = text.replace("L1TLW_x4", f"{loss}_x{scale}").replace("×4", f"×{scale}")
    return text.replace(LOSSES["L1TLW"].title, LOSSES[loss].title)


def _changes(loss: str, scale: int, iterations: int) -> Options:
    """Return how the training of a cell differs from that of L1TLW at ×4."""
    train: Options = {"pixel_opt": LOSSES[loss].pixel_opt}
    changes: Options = {"train": train}
    if scale != 4:
        changes |= {"scale": scale, "network_g": {"upscale": scale}}
        changes["datasets"] = {"val": {"mod_crop": lcm(28, scale)}}  # 28 is the paper's
    if not loss.endswith("TLW"):
        changes["network_w"] = train["optim_w"] = None
    if LOSSES[loss].model != "TLWModel":
        changes["model_type"], train["tlw"] = LOSSES[loss].model, None
    if loss == "L1Uncertainty":
        changes["network_u"] = {"type": "UncertaintyHead", "num_in_ch": 64, "num_feat": 64, "upscale": scale}
        train["uncertainty"] = {"stage_one_iter": iterations // 2, "features": "upsample"}
    return changes


def find_section(text: str, key: str, depth: int = 0) -> tuple[int, int]:
    """Return start and end of a key's lines in a YAML that is indented by two spaces; the text's end if it is missing.

    ``depth`` is the level of the key, 0 at the top of the file.
    """
    pad = "  " * depth
    found = re.search(rf"^{pad}{key}:.*\n(?:\n*{pad}  .*\n)*", text, re.MULTILINE)
    return found.span() if found else (len(text), len(text))


def change(text: str, changes: Options, depth: int = 0) -> str:
    """Change values in the text of a YAML by key; all other lines and their comments stay.

    None deletes a key, a dict without ``type`` changes its section, one with ``type`` takes the place of the section.
    """
    for key, value in changes.items():
        start, end = find_section(text, key, depth)
        if value is None:
            new = ""
        elif isinstance(value, dict) and "type" not in value and start < end:
            new = change(text[start:end], value, depth + 1)
        else:
            new = indent(yaml.safe_dump({key: value}, sort_keys=False), "  " * depth)
            new = new if depth or start < end else f"\n{new}"
        text = text[:start] + new + text[end:]
    return re.sub(r"\n{3,}", "\n\n", text)
