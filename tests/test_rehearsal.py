"""What is tried before a training: nothing of it is left, and options remember who has read them."""

import copy
import pickle
from copy import deepcopy
from unittest.mock import Mock

import pytest
import torch
from basicsr.utils.logger import initialized_logger

from tests.conftest import PSNR, plain_options, tiny_options, write_yaml
from tests.helpers import EVERY_BASE, check_all, log_text, refused
from tlw_basicsr import UserError
from tlw_basicsr.engine import rehearsal
from tlw_basicsr.engine.pipeline import test_pipeline as run_test
from tlw_basicsr.engine.recorded import Asked, MissingOption, Recorded
from tlw_basicsr.metrics.paper_metrics import lpips_model
from tlw_basicsr.models import TLWMixin
from tlw_basicsr.util.files import load_file


def unpack(**options):
    return options


# how a key is read, and the places that are noted by it
READS = {
    "brackets": (lambda o: o["a"], {("a",)}),
    "get": (lambda o: o.get("a"), {("a",)}),
    "get what is not there": (lambda o: o.get("z", 1), {("z",)}),
    "in": (lambda o: "z" in o, {("z",)}),
    "pop": (lambda o: o.pop("a"), {("a",)}),
    "pop what is not there": (lambda o: o.pop("z", None), {("z",)}),
    "setdefault": (lambda o: o.setdefault("z", 1), {("z",)}),
    "iteration": (list, {("a",), ("b",)}),
    "items": (lambda o: o.items(), {("a",), ("b",)}),
    "values": (lambda o: o.values(), {("a",), ("b",)}),
    "arguments": (lambda o: unpack(**o), {("a",), ("b",)}),
    "dict": (dict, {("a",), ("b",)}),
    "unpacking": (lambda o: {**o}, {("a",), ("b",)}),
    "union": (lambda o: o | {"c": 1}, {("a",), ("b",)}),
    "union from the right": (lambda o: {"c": 1} | o, {("a",), ("b",)}),
    "update": (lambda o: {}.update(o), {("a",), ("b",)}),
    "nested": (lambda o: o["b"]["type"], {("b",), ("b", "type")}),
    "deepcopy": (lambda o: deepcopy(o)["b"].pop("type"), {("b",), ("b", "type")}),
    "copy": (lambda o: copy.copy(o).copy()["b"]["type"], {("b",), ("b", "type")}),
    "nested of a plain dict": (lambda o: dict(o)["b"]["type"], {("a",), ("b",), ("b", "type")}),
    "nothing": (lambda o: (deepcopy(o), isinstance(o, dict), o == {}, len(o)), set()),
    "writing": (lambda o: o.update(z=1), set()),
}


@pytest.mark.parametrize("name", READS)
def test_options_remember_what_was_read(name):
    read, places = READS[name]
    asked = Asked()
    read(Recorded({"a": 1, "b": {"type": "T", "c": 2}}, asked))
    assert asked.places == places
    assert asked.newest == (("b",) if ("b", "type") in places else ())


def test_recorded_options_are_the_options():
    content = {"a": 1, "b": {"c": [{"d": 2}]}}
    recorded = Recorded(content, Asked())
    assert recorded == content == deepcopy(recorded) and isinstance(recorded["b"], dict)
    assert dict(pickle.loads(pickle.dumps(dict(content)))) == content
    for read in (lambda: recorded["b"]["z"], lambda: recorded["b"].pop("z"), lambda: {}["z"]):
        with pytest.raises(KeyError) as error:
            read()
    with pytest.raises(MissingOption, match=r"b\.z"):
        deepcopy(recorded)["b"]["z"]
    assert error.value.args == ("z",)


# ------------------------------------------------------------------------------------------------- without a trace


@pytest.mark.parametrize("make", [tiny_options, plain_options])
def test_a_training_is_the_same_with_and_without(photographs, train, tmp_path, make):
    """To the bit, with one line more in the log."""
    experiments = [
        train(make(photographs, train__rehearse=rehearse, train__total_iter=3), root=tmp_path / str(rehearse))
        for rehearse in (True, False)
    ]
    states = [load_file(f / "models/net_g_latest.pth", "") for f in experiments]
    for key, state in states[0].items():
        assert all(torch.equal(state[name], states[1][key][name]) for name in state)
    first, second = map(log_text, experiments)
    assert first.count("Rehearsed one iteration and 1 validation in ") == 1 and " GiB at most." in first
    assert "Rehearsed" not in second
    assert first.count("Network [EDSR] is created.") == second.count("Network [EDSR] is created.")


def test_a_failure_leaves_nothing_and_prints_nothing(photographs, train, tmp_path, capfd, monkeypatch):
    opt = tiny_options(photographs, train__total_iter=1)
    train(opt)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(rehearsal.tempfile, "tempdir", None)
    monkeypatch.setattr(TLWMixin, "tlw_pixel_loss", lambda *_: print("loud") or 1 / 0)
    capfd.readouterr()
    refused("TLWModel fails in the first iteration \\(ZeroDivisionError", train, opt)
    assert sorted(tmp_path.rglob("*")) == before
    assert capfd.readouterr() == ("", "") and not initialized_logger


@pytest.fixture
def offline(tmp_path, monkeypatch):
    lpips_model.cache_clear()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("no network")))


LPIPS = {"lpips": {"type": "tlw_lpips", "better": "lower"}}


def test_who_has_no_weights_of_vgg_is_stopped_once(photographs, train, tmp_path, offline):
    """The first line names what else needs them; a metric that no network is selected by is left out afterwards."""
    small = {"train__total_iter": 1, "val__val_freq": 1, "val__metrics": {**LPIPS, "psnr": PSNR}}
    opt = tiny_options(photographs, **small)
    opt["val"]["save_best"] = "lpips"
    opt["train"]["pixel_opt"]["distance"] = {"type": "LPIPSDistance"}
    refused(r"^train.pixel_opt.distance: .*val.save_best: lpips needs such weights, too$", train, opt)
    opt["train"]["pixel_opt"]["distance"] = {"type": "SSIMDistance", "kernel_size": 5}
    refused(r"^val.metrics.lpips: LPIPS: the ImageNet weights .* do without it, or put", train, opt)
    assert not (tmp_path / "experiments").exists()
    opt["val"]["save_best"] = "psnr"
    text = log_text(train(opt))
    assert text.count("val.metrics.lpips is left out: LPIPS: the ImageNet weights of vgg could not be loaded") == 1
    assert "# psnr:" in text and "# lpips" not in text and "going on" not in text


def test_a_test_does_not_leave_out_a_metric(photographs, tmp_path, monkeypatch, offline):
    opt = plain_options(photographs, train=..., logger=..., val__metrics=LPIPS)
    opt["datasets"] = {"test": opt["datasets"]["val"]}
    monkeypatch.chdir(tmp_path)
    refused(r"val.metrics.lpips: LPIPS", run_test, str(tmp_path), ["-opt", str(write_yaml(tmp_path, opt))])


def test_tlw_test_rehearses_before_results_are_moved(photographs, tmp_path, monkeypatch):
    opt = plain_options(photographs, train=..., logger=...)
    opt["datasets"] = {"test": opt["datasets"]["val"]}
    monkeypatch.chdir(tmp_path)
    run_test(str(tmp_path), ["-opt", str(write_yaml(tmp_path, opt))])
    before = sorted(tmp_path.rglob("*"))
    log = next((tmp_path / "results/tiny").glob("test_*.log")).read_text()
    assert "Rehearsed 1 validation in" in log and log.count("Validation photos_val") == 1
    opt["network_g"]["num_in_ch"] = 1
    with pytest.raises(UserError, match="network_g: EDSR fails in the validation on photos_val"):
        run_test(str(tmp_path), ["-opt", str(write_yaml(tmp_path, opt))])
    assert sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------------------------- what is met


def test_a_network_that_fails_on_the_batch_is_named_with_its_sizes(photographs, tmp_path):
    fed = {"gt_usm": True, "datasets__train__gt_size": 48}  # has no kernels
    message = r"RealESRNetModel fails in the first iteration \(KeyError: 'kernel1'\); images: lq \(2, 3, 24, 24\)"
    refused(message, check_all, tmp_path, plain_options(photographs, model_type="RealESRNetModel", **fed))
    opt = tiny_options(photographs, base_model="SRGANModel", **EVERY_BASE["SRGANModel"])
    opt["network_d"] = {"type": "VGGStyleDiscriminator", "num_in_ch": 3, "num_feat": 4, "input_size": 128}
    message = (
        r"network_d: VGGStyleDiscriminator fails in the first iteration \(AssertionError: Input size must be ident"
    )
    refused(message, check_all, tmp_path, opt)


def test_a_discriminator_that_begins_first_does_not_hide_the_generator(photographs, tmp_path):
    opt = tiny_options(photographs, base_model="ESRGANModel", **EVERY_BASE["ESRGANModel"])
    opt["train"] |= {"net_d_iters": 2, "net_d_init_iters": 100}
    assert check_all(tmp_path, opt) == []


LATE = """
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY
@MODEL_REGISTRY.register()
class LateModel(SRModel):
    def optimize_parameters(self, current_iter):
        assert self.opt["window"] == 3, "the window must be 3"
        assert self.opt["queue_size"] % 4 == 0, "queue size should be divisible by batch size"
"""


def test_a_plugin_that_fails_late_in_its_own_way_names_model_stage_and_option(photographs, tmp_path, monkeypatch):
    (tmp_path / "late_plugin.py").write_text(LATE)
    monkeypatch.chdir(tmp_path)
    opt = plain_options(photographs, plugins=["late_plugin"], model_type="LateModel", queue_size=6)
    refused(r"^window: missing; it is read in the first iteration", check_all, tmp_path, opt)
    stage = r"model_type: LateModel fails in the first iteration \(AssertionError: "
    refused(f"{stage}the window must be 3", check_all, tmp_path, {**opt, "window": 5})
    refused(f"{stage}queue size should be .*; queue_size: 6", check_all, tmp_path, {**opt, "window": 3})
