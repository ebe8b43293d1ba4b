"""What users of other programs are used to: a deterministic switch, early stopping, piq's metrics, output for scripts."""

import io
import json
import subprocess
import sys

import numpy as np
import piq
import pytest
import torch
from basicsr.utils.registry import METRIC_REGISTRY

from tests.conftest import as_tensor, photograph, tiny_options, write_yaml
from tests.helpers import log_text, refused
from tlw_basicsr import UserError, cli
from tlw_basicsr.commands import completion, evaluate, options, weights
from tlw_basicsr.engine.options import check_options
from tlw_basicsr.metrics import paper_metrics
from tlw_basicsr.tools.recipes import describe_recipes
from tlw_basicsr.util.errors import coloured

PSNR = {"psnr": {"type": "calculate_psnr", "crop_border": 2}}


def validated(photographs, **changes):
    """A training that is validated after each of 24 iterations, and gets worse: its learning rate is far too high."""
    val = {"val_freq": 1, "save_img": False, "metrics": PSNR, "save_best": "psnr", **changes}
    train = {"train__total_iter": 24, "train__optim_g__lr": 1.0, "train__ema_decay": 0, "train__rehearse": False}
    return tiny_options(photographs, val=val, logger__save_checkpoint_freq=100, **train)


def falling(monkeypatch, best):
    """Let PSNR rise until an iteration and fall from there."""
    values = iter([*range(best), *range(best - 2, -100, -1)])
    monkeypatch.setitem(METRIC_REGISTRY._obj_map, "calculate_psnr", lambda img, img2, **_: next(values))


def one_image(opt, photographs):
    opt["datasets"]["val"]["meta_info_file"] = str(photographs / "one.txt")
    (photographs / "one.txt").write_text(next(photographs.glob("*.png")).name + "\n")
    return opt


def test_patience_ends_a_training_and_a_long_fall_is_told(photographs, train, monkeypatch):
    falling(monkeypatch, 3)
    folder = train(one_image(validated(photographs, patience=4), photographs))
    text = log_text(folder)
    assert "val.patience: psnr has been no better for 4 validations; the training ends." in text
    assert {"net_g_7.pth", "net_g_best.pth", "net_g_latest.pth"} <= {path.name for path in folder.glob("models/*")}
    assert not (folder / "models/net_g_8.pth").exists()
    falling(monkeypatch, 3)
    text = log_text(train(one_image(validated(photographs), photographs) | {"name": "long"}))
    assert text.count("psnr of photos_val was best at iteration 3, 10 validations ago") == 1
    assert text.count("20 validations ago") == 1 and "the training ends" not in text


def test_patience_needs_a_metric(photographs, train):
    opt = validated(photographs, patience=4)
    del opt["val"]["save_best"]
    refused(r"val.patience: needs val.save_best", train, opt)


def test_the_deterministic_switch_is_torchs(photographs, train, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", seen.append)
    small = {"train__total_iter": 1, "val": ..., "train__rehearse": False}
    text = log_text(train(tiny_options(photographs, deterministic=True, **small)))
    assert seen == [True] and not torch.backends.cudnn.benchmark
    assert "deterministic: cuDNN does not search" in text
    train(tiny_options(photographs, **small))
    assert seen == [True] and torch.backends.cudnn.benchmark
    # what a plugin has chosen stays
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    train(tiny_options(photographs, **small))
    assert seen == [True] and not torch.backends.cudnn.benchmark


def test_what_has_no_deterministic_algorithm_is_an_error_before_the_training(photographs, train, monkeypatch):
    def refuse(*_):
        if torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(False)
            raise RuntimeError("grid_sampler_backward does not have a deterministic implementation")

    monkeypatch.setattr("tlw_basicsr.core.tlw.TLW.k", refuse)
    with pytest.raises(
        UserError, match=r"model_type: TLWModel fails in .* does not have a deterministic implementation"
    ):
        train(tiny_options(photographs, deterministic=True))


@pytest.mark.parametrize("name", ["fsim", "gmsd", "haarpsi", "mdsi", "vif", "vsi"])
def test_metrics_of_piq_by_name(name):
    a, b = photograph("coffee", 90, 90), photograph("coffee", 92, 90)
    value = METRIC_REGISTRY.get("tlw_piq")(a[..., ::-1], b[..., ::-1], name=name)
    expected = getattr(piq, "vif_p" if name == "vif" else name)(as_tensor(a), as_tensor(b)).item()
    assert value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("metric", ["tlw_l1", "tlw_lpips", "calculate_niqe", "gmsd", "vsi", "calculate_psnr"])
def test_the_best_network_is_chosen_by_the_direction_of_the_metric(photographs, metric):
    """The default, higher, would keep the worst network of one that falls."""
    lower = metric not in ("vsi", "calculate_psnr")
    options = {"type": "tlw_piq", "name": metric} if metric in ("gmsd", "vsi") else {"type": metric}
    options |= {"crop_border": 2} if metric.startswith("calculate") else {}
    opt = tiny_options(photographs, val__metrics={"m": options})
    check_options(opt, is_train=True)
    assert opt["val"]["metrics"]["m"]["better"] == ("lower" if lower else "higher")
    opt["val"]["metrics"]["m"]["better"] = "higher" if lower else "lower"
    with pytest.raises(UserError, match=r"^val.metrics.m.better: \w+, but \w+ is better where it is (lower|higher)$"):
        check_options(opt, is_train=True)


def test_dists_without_its_weights_is_one_line(monkeypatch):
    def offline():
        raise OSError("no network")

    monkeypatch.setattr(piq, "DISTS", offline)
    with pytest.raises(UserError, match=r"tlw_piq: the weights of DISTS could not be loaded \(OSError: no network\)"):
        paper_metrics.tlw_piq(np.zeros((64, 64, 3)), np.zeros((64, 64, 3)), name="dists")


def test_values_as_json_for_scripts(photographs, train, tmp_path, monkeypatch, capsys):
    evaluate.main(["--gt", str(photographs), "--scale", "2", "--bicubic", "--json"])
    assert json.loads(capsys.readouterr().out).keys() == {"field", "paper"}
    options.main(["--json"])
    assert [*json.loads(capsys.readouterr().out)] == [*describe_recipes()]
    opt = tiny_options(photographs, train__total_iter=1, val=..., train__rehearse=False)
    train(opt)
    yaml, image = write_yaml(tmp_path, opt), next(photographs.glob("*.png"))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    weights.main(["--opt", str(yaml), "--image", str(image), "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["file"] == "weights.png" and values["iteration"] == 1 and "wc_gain" in values


def test_a_shell_completes_commands_and_their_arguments(capsys):
    completion.main(["bash"])
    script = capsys.readouterr().out
    program = "COMP_WORDS=({}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); _shtab_tlw; echo ${{COMPREPLY[@]}}"
    for words, expected in (("tlw inf", "infer"), ("tlw infer --mo", "--model"), ("tlw train --auto", "--auto_resume")):
        done = subprocess.run(
            ["bash", "-c", f"{script}\n{program.format(words)}"], capture_output=True, text=True, check=False
        )
        assert done.stdout.split() == [expected], done.stderr
    for shell in ("zsh", "fish"):
        completion.main([shell])
        script = capsys.readouterr().out
        assert all(name in script for name in cli.COMMANDS)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_words_have_colour_on_a_terminal_alone(monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert coloured("error:", 31) == "error:"
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert coloured("error:", 31) == "\033[31merror:\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert coloured("error:", 31) == "error:"
