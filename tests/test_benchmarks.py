"""The benchmarks run, at toy size, on the code that trains."""

import json
import subprocess
import sys

import pytest
import yaml

from tests.conftest import ROOT, plain_options, tiny_options


def run_script(name, *arguments, cwd):
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_speed_benchmark(tmp_path):
    arguments = ["--patch", 32, "--batch", 1, "--rounds", 1, "--kinds", "l1", "error", "economy", "--device", "cpu"]
    out = run_script("benchmark_speed.py", *arguments, "--json", tmp_path / "speed.json", cwd=tmp_path)
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert set(rows) == {"l1", "error", "economy"} and all(f"| {name} |" in out for name in rows)
    assert rows["l1"]["ratio"] == 1 and rows["economy"]["gflop"] > rows["error"]["gflop"] == rows["l1"]["gflop"]
    assert rows["economy"]["p95_s"] > rows["economy"]["median_s"] > 0


@pytest.mark.slow
def test_loading_and_whole_trainings_are_timed_and_leave_nothing(tmp_path, photographs):
    assert run_script("benchmark_data.py", "--gt", photographs, "--gt-size", 16, cwd=tmp_path).strip()
    changes = {"network_w": ..., "train__optim_w": ..., "train__tlw": {"preset": "economy", "k_unit": "iter"}}
    files = {"plain.yml": plain_options(photographs), "economy.yml": tiny_options(photographs, **changes)}
    for name, opt in files.items():
        (tmp_path / name).write_text(yaml.safe_dump(opt))
    out = run_script("benchmark_speed.py", "--yaml", *files, "--iterations", 8, "--rounds", 1, cwd=tmp_path)
    assert "plain: 0." in out and ", 1.000 of the first" in out and "economy: 0." in out
    assert [path.name for path in (tmp_path / "experiments").iterdir()] == []
