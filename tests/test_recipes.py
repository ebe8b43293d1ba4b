"""Recipes: whole YAML files, the cells that are made of them, and the tables of options in the documentation."""

import zipfile
from shutil import copy, copytree

import pytest
import torch

from tests.conftest import ROOT
from tests.helpers import refused, run_python
from tlw_basicsr.engine.options import check_options
from tlw_basicsr.engine.schema import TrainOptions
from tlw_basicsr.losses.tlw_loss import TLWLoss, describe_options
from tlw_basicsr.models import build_model
from tlw_basicsr.tools.recipes import CELLS, FILES, LOSSES, change, describe_recipes, recipe
from tlw_basicsr.util.kinds import describe_parameters
from tlw_basicsr.util.yaml_options import load_yaml

YAMLS = sorted((ROOT / "options").rglob("*.yml"))


def test_every_recipe_passes_the_check_and_bears_its_name():
    four = {"L1", "MSE", "L1TLW", "MSETLW"}
    cells = {(net, loss, scale) for net in ("EDSR", "VDSR", "RCAN") for loss in four for scale in (2, 3, 4)}
    cells |= {("HAT", loss, 4) for loss in ("L1", "L1TLW", "L1Uncertainty")} | {("RRDB", loss, 4) for loss in four}
    assert cells <= set(CELLS.values())
    names = [*describe_recipes()]
    assert {f"{kind}{net}_{loss}_x{scale}" for kind in ("", "test_") for net, loss, scale in cells} <= set(names)
    for name in names:
        text = recipe(name)
        opt = load_yaml(text, name)
        check_options(opt, "train" in opt)
        assert (opt["name"].removeprefix("train_") == name and f"tlw options {name}" in text) or "quick" in name
    assert recipe("train_EDSR_L1TLW_x4.yml") == recipe("EDSR_L1TLW_x4") == FILES["EDSR_L1TLW_x4"].read_text("utf-8")
    refused(r"EDRS_L1_x4: there is no recipe of this name \(did you mean EDSR_L1_x4\?\)", recipe, "EDRS_L1_x4")


@pytest.mark.parametrize("name", [f"{net}_{loss}_x{scale}" for net, loss, scale in CELLS.values() if scale != 2])
def test_a_cell_differs_from_another_by_its_loss_and_scale_alone(name):
    """Its test measures the same network, and nothing in a file speaks of another cell."""
    network, loss, scale = name.split("_")
    whole, opt, test = (load_yaml(recipe(n), n) for n in (f"{network}_L1TLW_x4", name, f"test_{name}"))
    assert test["network_g"] == opt["network_g"] and test["scale"] == opt["scale"] == int(scale[1:])
    assert test["path"]["pretrain_network_g"] == f"experiments/train_{name}/models/net_g_best.pth"
    assert {metric["crop_border"] for metric in test["val"]["metrics"].values()} == {opt["scale"]}
    assert opt["datasets"]["val"]["mod_crop"] == (84 if scale == "x3" else 28)
    assert opt["datasets"]["train"] == whole["datasets"]["train"]
    assert {**opt["network_g"], "upscale": 4} == {**whole["network_g"], "upscale": 4}
    for key in ("optim_g", "scheduler", "total_iter", "init_g", "ema_decay"):
        assert opt["train"][key] == whole["train"][key]
    for text in (recipe(name), recipe(f"test_{name}")):
        head = text.splitlines()[1]
        assert head.startswith(f"# {network} ×{scale[1:]} ") and f"with {LOSSES[loss].title}" in head
        assert "# convolutions start" in text or "# the weighting network is not needed" in text  # comments stay


def test_a_change_leaves_all_other_lines():
    text = "# head\na: 1  # one\n\nb:  # two\n  c: 1\n\n  d:\n    e: 2  # last\n\ncc:\n  b: 3\n"
    section = text[text.index("b:") : text.index("\ncc:")]
    for changes, old, new in (
        ({"b": None}, section, ""),
        ({"b": {"d": {"e": 5}}}, "e: 2  # last", "e: 5"),
        ({"b": {"type": "X"}}, section, "b:\n  type: X\n"),
        ({"cc": {"b": 4, "f": 5}}, "  b: 3\n", "  b: 4\n  f: 5\n"),
    ):
        expected = text.replace(old, new).replace("\n\n\n", "\n\n")
        assert change(text, changes) == expected


def test_recipes_of_practice_begin_as_practitioners_would():
    practices = [name for name in FILES if name.startswith("recipe_")]
    assert len(practices) == 4
    for name in practices:
        opt = load_yaml(recipe(name), name)
        train, data = opt["train"], opt["datasets"]["train"]
        assert opt["model_type"] == "TLWModel" and train["tlw"]["preset"] == "economy" and train["ema_decay"] > 0
        assert data["gt_size"] and data["batch_size_per_gpu"] == 16 and data.get("quantize_lq", True)
        assert train["scheduler"]["type"] in ("MultiStepLR", "CosineAnnealingRestartLR")
        assert "network_w" not in opt and "optim_w" not in train
        assert train["pixel_opt"]["distance"] == {"type": "SSIMDistance"}  # nothing to download, neither for a metric
        assert {metric["type"] for metric in opt["val"]["metrics"].values()} <= {"calculate_psnr", "calculate_ssim"}


BUILT = [(net, loss) for net, loss, scale in CELLS.values() if scale == 4 and ("EDSR" in net or loss == "L1TLW")]


@pytest.mark.parametrize(("network", "loss"), [*BUILT, ("RCAN", "L1Uncertainty"), ("HAT", "L1Uncertainty")])
def test_a_cell_builds_its_model(network, loss):
    """The whole model with its optimisers and its loss, with a distance that needs no pretrained weights."""
    opt = load_yaml(recipe(f"{network}_{loss}_x4"), loss)
    if loss in ("L1TLW", "MSETLW"):
        assert opt["train"]["pixel_opt"]["distance"] == {
            "type": "LPIPSDistance", "net": "vgg", "linear": False, "weights": None
        }  # fmt: skip
        opt["train"]["pixel_opt"]["distance"] = {"type": "SSIMDistance"}
    model = build_model(opt | {"num_gpu": 0, "is_train": True, "dist": False, "rank": 0, "world_size": 1})
    assert {key for key in opt if key.startswith("network_")} == {
        f"network_{n}" for n in "gwu" if getattr(model, f"net_{n}", None) is not None
    }
    weights = next(m.weight for m in model.net_g.modules() if isinstance(m, torch.nn.Conv2d))
    assert weights.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.slow
def test_the_wheel_has_the_files(tmp_path):
    """They lie in ``options/``, to which the package has a link."""
    pytest.importorskip("setuptools", "77")
    source = copytree(ROOT / "tlw_basicsr", tmp_path / "tlw_basicsr", symlinks=True).parent
    copytree(ROOT / "options", source / "options")
    for name in ("pyproject.toml", "requirements.txt", "tlw_setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        copy(ROOT / name, source)
    run_python(source, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels", ".")
    with zipfile.ZipFile(next((source / "wheels").glob("*.whl"))) as wheel:
        packed = {n: wheel.read(n).decode() for n in wheel.namelist() if n.endswith(".yml")}
    assert packed == {f"tlw_basicsr/{path.relative_to(ROOT)}": path.read_text("utf-8") for path in YAMLS}


def test_the_tables_of_the_docs_name_every_option():
    run_python(ROOT, "scripts/generate_options.py", "--check")
    page = (ROOT / "docs/options.md").read_text("utf-8")
    for name in [*describe_options(), *describe_parameters(TLWLoss), *describe_parameters(TrainOptions)]:
        assert f"| `{name}` | " in page
    missing = [line for line in page.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert not missing, missing  # every option has a meaning
