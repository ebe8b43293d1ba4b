"""BasicSR-style files to their TLW version: only what must change changes."""

import difflib
import math
from unittest.mock import Mock

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import refused
from tlw_basicsr import UserError
from tlw_basicsr.core.functional import k_schedule
from tlw_basicsr.engine.options import check_options
from tlw_basicsr.tools.add_tlw import DISTANCE, add_tlw, describe_changes
from tlw_basicsr.tools.recipes import recipe
from tlw_basicsr.util.yaml_options import load_yaml

PSNR = """\
# general settings
name: 001_EDSR_x4   # a comment
model_type: SRModel
scale: 4
num_gpu: 1  # set num_gpu: 0 for cpu mode

datasets:
  train:
    name: DIV2K
    type: BicubicSRDataset
    dataroot_gt: datasets/DIV2K/DIV2K_train_HR_sub
    io_backend: {type: disk}
    gt_size: 192
    batch_size_per_gpu: 16
    num_worker_per_gpu: 6

network_g:
  type: EDSR
  num_in_ch: 3
  num_out_ch: 3
  rgb_mean: [0.4488, 0.4371, 0.4040]   # RGB

path: {pretrain_network_g: ~}

# training settings
train:
  ema_decay: 0.999
  optim_g:
    type: Adam
    lr: !!float 1e-4
    betas: [0.9, 0.99]

  scheduler: {type: MultiStepLR, milestones: [200000], gamma: 0.5}

  total_iter: 300000
  # losses
  pixel_opt:
    type: L1Loss  # the paper's
    loss_weight: 1.0
    reduction: mean

logger: {print_freq: 100, save_checkpoint_freq: !!float 5e3, use_tb_logger: true}
"""

GAN = """\
name: gan
model_type: ESRGANModel
scale: 4
datasets: {train: {name: x, type: PairedImageDataset}}
network_g: {type: RRDBNet, num_in_ch: 3, num_out_ch: 3}   # one line
train:
  optim_g: &adam {type: Adam, lr: !!float 1e-4, betas: [0.9, 0.99]}
  optim_d: *adam
  total_iter: !!float 4e5
  pixel_opt: {type: L1Loss, loss_weight: !!float 1e-2, reduction: mean}
  perceptual_opt: {type: PerceptualLoss, layer_weights: {'conv5_4': 1}}
  gan_opt: {type: GANLoss, gan_type: vanilla, loss_weight: !!float 5e-3}
"""

YAMLS_PIXEL_OPT = "{type: L1Loss, loss_weight: !!float 1e-2, reduction: mean}"
VIDEO = """\
name: video
model_type: EDVRModel
network_g:
    type: EDVR
train:
    optim_g: {type: Adam}
    total_iter: 600000
    pixel_opt:
        type: CharbonnierLoss
        loss_weight: 1.0
        eps: !!float 1e-12   # of the root
        reduction: sum
    tsa_iter: 50000
"""

ANCHORS = """\
defaults: &l1 {type: L1Loss, loss_weight: 1.0}
name: anchors
model_type: SRModel
network_g: {type: EDSR}
train:
  optim_g: {type: Adam}
  total_iter: 100
  pixel_opt: *l1
"""

MERGED = ANCHORS.replace("pixel_opt: *l1", "pixel_opt:\n    <<: *l1\n    reduction: mean")

ONE_LINE = (
    "{name: all, model_type: SRModel, network_g: {type: EDSR},"
    " train: {optim_g: {type: Adam}, total_iter: 9, pixel_opt: {eps: 1, type: MSELoss}}}\n"
)

FILES = {"psnr": PSNR, "gan": GAN, "video": VIDEO, "anchors": ANCHORS, "merged": MERGED, "one_line": ONE_LINE}


def test_the_diff_of_a_psnr_file():
    diff = list(difflib.ndiff(PSNR.splitlines(), add_tlw(PSNR, "x").splitlines()))
    gone, new = ([line[2:] for line in diff if line.startswith(mark)] for mark in ("- ", "+ "))
    assert gone == ["name: 001_EDSR_x4   # a comment", "model_type: SRModel", "    type: L1Loss  # the paper's"]
    assert new == [
        "name: 001_EDSR_x4_TLW   # a comment",
        "model_type: TLWModel",
        "  tlw: {preset: economy, k_start: 0.3, k_end: 0.9, k_decay: 300000, k_unit: iter}",
        "    type: TLWLoss  # the paper's",
        "    base: l1",
        "    distance: {type: SSIMDistance}",
    ]


def test_the_distance_is_that_of_the_recipes_which_needs_no_download():
    opt = load_yaml(recipe("recipe_EDSR_x4"), "recipe")
    assert load_yaml(add_tlw(PSNR, "x"), "x")["train"]["pixel_opt"]["distance"] == DISTANCE
    assert opt["train"]["pixel_opt"]["distance"] == DISTANCE


def test_every_change_is_reported_and_the_result_passes_the_check_of_options():
    assert describe_changes(VIDEO, add_tlw(VIDEO, "x")) == [
        "name: video → video_TLW (so that the next training leaves the folder of the one without TLW alone)",
        "model_type: EDVRModel → TLWModel",
        "train.pixel_opt.type: CharbonnierLoss → TLWLoss (about 2k times L1: 0.6 in the beginning, 1 on average, "
        "1.4 at the end)",
        "train.pixel_opt.eps: 1.0e-12 is deleted (TLW takes |x̂ − x| itself, not Charbonnier's root)",
        "train.pixel_opt.reduction: sum → mean (TLW's loss is a mean, smaller than the sum by the number of values)",
        "train.pixel_opt.base: l1 is new",
        "train.pixel_opt.distance: {type: SSIMDistance} is new",
        "train.tlw: {preset: economy, k_start: 0.3, k_end: 0.9, k_decay: 600000, k_unit: iter} is new (k rises over the "
        "whole training)",
        "base_model: EDVRModel is new",
    ]
    assert "the balance with perceptual_opt, gan_opt changes" in describe_changes(GAN, add_tlw(GAN, "x"))[-1]
    assert describe_changes(PSNR, PSNR) == []
    check_options(load_yaml(add_tlw(PSNR.replace("num_gpu: 1 ", "num_gpu: 0 "), "x"), "x"), True)


def test_the_balance_with_other_losses_is_kept():
    """The mean of 2k over the training is 2(0.3 + 0.6/e)."""
    factor = 1 / (2 * (0.3 + 0.6 / math.e))
    weight = yaml.safe_load(add_tlw(GAN, "x", keep_balance=True))["train"]["pixel_opt"]["loss_weight"]
    assert weight == pytest.approx(1e-2 * factor, rel=1e-3)
    average = np.mean([2 * k_schedule(t, 0.3, 0.9, 1000) for t in range(1000)]) * factor
    assert average == pytest.approx(1, rel=1e-3)
    summed = PSNR.replace("reduction: mean", "reduction: sum").replace("    loss_weight: 1.0\n", "")
    weight = yaml.safe_load(add_tlw(summed, "x", keep_balance=True))["train"]["pixel_opt"]["loss_weight"]
    assert weight == pytest.approx(16 * 3 * 192 * 192 * factor, rel=1e-3)
    refused("--keep-balance: not with MSELoss", add_tlw, ONE_LINE, "x", keep_balance=True)


@pytest.mark.parametrize("new_name", ["baseline_2", "123", "a b"])
def test_the_name_can_be_given(new_name):
    assert yaml.safe_load(add_tlw(PSNR, "x", new_name=new_name))["name"] == new_name
    refused("name: expected a plain folder name", add_tlw, PSNR, "x", new_name=f"{new_name}/..")


@pytest.mark.parametrize("name", FILES)
def test_all_else_stays_and_twice_is_once(name):
    before = FILES[name]
    after = add_tlw(before, name)
    assert add_tlw(after, name) == after
    for comment in [line.split("#", 1)[1] for line in before.splitlines() if "#" in line]:
        assert f"#{comment}" in after or "of the root" in comment
    old, new = yaml.safe_load(before), yaml.safe_load(after)
    pixel, old_pixel = new["train"].pop("pixel_opt"), old["train"].pop("pixel_opt")
    assert new["train"].pop("tlw")["k_decay"] == old["train"]["total_iter"] and new["train"] == old["train"]
    assert new.pop("model_type") == "TLWModel" and new.pop("base_model", "SRModel") == old.pop("model_type")
    assert new.pop("name") == f"{old.pop('name')}_TLW"
    assert new == old and list(new) == list(old)
    assert pixel["type"] == "TLWLoss" and pixel["base"] == ("mse" if name == "one_line" else "l1")
    assert pixel.get("loss_weight") == old_pixel.get("loss_weight")
    assert "eps" not in pixel and pixel.get("reduction", "mean") == "mean"


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_files_never_seen(data):
    """Any indentation, order, comments, line ends and style of the sections."""
    indent = data.draw(st.integers(1, 6))
    newline = data.draw(st.sampled_from(["\n", "\r\n"]))
    comment = st.sampled_from(["", "  # type: L1Loss", " # {", "  # pixel_opt: x", "   #"])
    full_line = st.sampled_from(["", "# a line", "   # train:", "\n", "#"])

    def section(items, depth):
        lines = []
        for key, value in data.draw(st.permutations(list(items.items()))):
            lines += [line for line in [data.draw(full_line)] if line]
            start, end = f"{' ' * (indent * depth)}{key}:", data.draw(comment)
            if isinstance(value, dict) and (not data.draw(st.booleans()) or (depth == 0 and key == "train")):
                lines += [f"{start}{end}", *section(value, depth + 1)]
                continue
            quoted = data.draw(st.sampled_from([None, "'"])) if isinstance(value, str) else None
            text = yaml.safe_dump(value, default_flow_style=True, default_style=quoted, width=9999)
            lines.append(f"{start} {text.splitlines()[0]}{end}")
        return lines

    model, loss = (data.draw(st.sampled_from(s)) for s in (["SRModel", "HATModel"], ["L1Loss", "MSELoss"]))
    pixel = {"type": loss, "loss_weight": 2.0}
    train = {"optim_g": {"type": "Adam", "lr": 0.1}, "total_iter": 1000, "pixel_opt": pixel}
    train["gan_opt"] = {"type": "GANLoss"}
    opt = {"name": "n", "model_type": model, "scale": 4, "network_g": {"type": "EDSR", "num_feat": 64}}
    opt |= {"path": {"pretrain_network_g": None}, "train": train}
    text = "\n".join(section(opt, 0)).replace("\n", newline) + newline
    after = add_tlw(text, "x")
    assert add_tlw(after, "x") == after
    assert ("\r" in after) == ("\r" in text)
    new = yaml.safe_load(after)
    assert new["train"]["pixel_opt"]["type"] == "TLWLoss" and new["train"]["gan_opt"] == {"type": "GANLoss"}
    assert new["train"]["tlw"]["preset"] == "economy" and {"network_g", "path"} <= new.keys()


TIED = PSNR.replace("pixel_opt:", "pixel_opt: &p").replace("\nlogger:", "\ncopy: *p\nlogger:")
REFUSED = [  # what a file has instead of a part of PSNR, what the message has
    ("pixel_opt:", "perceptual_opt:", "train.pixel_opt is missing; TLW takes the place of a pixel loss"),
    ("  pixel_opt:\n", "  pixel_opt: ~\n  x:\n", "train.pixel_opt is missing"),
    ("L1Loss", "WeightedTVLoss", "'WeightedTVLoss'; accepted are L1Loss, MSELoss, CharbonnierLoss"),
    (PSNR[PSNR.index("train:\n  ema") :], "", "train is missing; expected is a training YAML"),
    ("model_type: SRModel\n", "", "model_type is missing"),
    ("model_type: SRModel", "model_type: [SRModel]", "model_type: expected text, got ['SRModel']"),
    *(
        ("300000", value, "total_iter: expected a number of at least 1")
        for value in ("many", "~", ".inf", "[1]", "0", "-5")
    ),
    *(("type: L1Loss", f"type: {value}", "accepted are L1Loss, MSELoss") for value in ("[L1Loss]", "{a: 1}", "5", "~")),
    (PSNR, "name: [", "not valid YAML"),
    (PSNR, "just text", "must hold options"),
    (PSNR, TIED, "can't be rewritten without changing other sections"),
]


def test_refusals():
    for old, new, message in REFUSED:
        with pytest.raises(UserError) as error:
            add_tlw(PSNR.replace(old, new), "my.yml")
        assert message in str(error.value) and "my.yml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "base"),
    [
        ("{type: CharbonnierLossColor, eps: 1.0e-6, loss_weight: 2.0, reduction: mean}", None),
        ("{type: PSNRLoss, loss_weight: 2.0, reduction: mean, toY: false}", None),
        ("{type: FocalLoss, alpha: 3, loss_weight: 2.0}", "mse"),
    ],
)
def test_pixel_losses_of_others(section, base):
    new = load_yaml(add_tlw(GAN.replace(YAMLS_PIXEL_OPT, section), "x", base=base), "x")
    given = load_yaml(section, "x")
    expected = base or {"CharbonnierLossColor": "l1", "PSNRLoss": "mse"}[given["type"]]
    kept = {key: given[key] for key in ("loss_weight", "reduction") if key in given}
    assert new["train"]["pixel_opt"] == {"type": "TLWLoss", "base": expected, **kept, "distance": DISTANCE}
    for wrong, message in (("toY: true", "pixel_opt.toY"), ("x: 1", "any with --base l1 or --base mse")):
        kind = "PSNRLoss" if "toY" in wrong else "FocalLoss"
        refused(message, add_tlw, GAN.replace(YAMLS_PIXEL_OPT, f"{{type: {kind}, {wrong}}}"), "x")


def test_the_program(tmp_path, script):
    (tmp_path / "in.yml").write_text(GAN)
    assert "train.tlw: " in script("add_tlw.py", "in.yml", "out.yml")
    (tmp_path / "in.yml").write_text("train: {}")
    line = script("add_tlw.py", "in.yml", "out.yml", code=2)
    assert line == "error: in.yml: model_type is missing; expected is a training YAML of BasicSR\n"
    assert (tmp_path / "out.yml").read_text() == add_tlw(GAN, "x")


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, script, monkeypatch):
    path = tmp_path / "in.yml"
    path.write_text(GAN)
    link = tmp_path / "link.yml"
    link.symlink_to(path)

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", Mock(side_effect=OSError(28, "No space left on device")))
        line = script("add_tlw.py", path, path, code=2)
    assert line == f"error: {path} can't be written (No space left on device)\n"
    assert path.read_text() == GAN and {p.name for p in tmp_path.iterdir()} == {"in.yml", "link.yml"}
    script("add_tlw.py", path, link)
    assert link.is_symlink() and path.read_text() == add_tlw(GAN, "x")
    script("add_tlw.py", path, "/dev/null", code=2)
