"""The benchmarks run, at toy size, on the code that trains."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


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
def test_the_data_benchmark(tmp_path, photographs):
    out = run_script("benchmark_data.py", "--gt", photographs, "--gt-size", 16, cwd=tmp_path)
    assert out.strip()
