"""Two runs of one thing, processes without a parent, files that are none, images too large, plugins that run code."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import ROOT, tiny_options, write_yaml
from tests.helpers import log_text, quick, start, wait_for
from tlw_basicsr import UserError
from tlw_basicsr.data.images import image_size, read_picture
from tlw_basicsr.engine.options import read_options
from tlw_basicsr.models.states import take_gradients
from tlw_basicsr.util.errors import clean
from tlw_basicsr.util.files import hold_lock, load_file, open_regular

ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def list_files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"}


# ------------------------------------------------------------------------------------------------- locks


def test_a_lock_is_one_processs_alone_and_says_whose(tmp_path):
    path, warnings = tmp_path / "x.lock", []
    with hold_lock(path, "it", warnings.append) as held:
        with pytest.raises(
            UserError, match=rf"^it is in use by process {os.getpid()} on \S+ since 20\d\d-.*; its lock is"
        ):
            hold_lock(path, "it", warnings.append).__enter__()
        child = os.fork()
        if not child:  # a worker that outlives this process does not hold it
            closed = False
            try:
                os.fstat(held[0])
            except OSError as error:
                closed = error.errno == errno.EBADF
            os._exit(0 if closed else 1)
        assert os.waitpid(child, 0)[1] == 0
    with hold_lock(path, "it", warnings.append):
        pass
    assert warnings == []


def test_where_there_are_no_locks_it_is_a_warning(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("tlw_basicsr.util.files.fcntl.flock", fail)
    told = []
    with hold_lock(tmp_path / "x.lock", "it", told.append) as held:
        assert held == () and told == [
            "it can't be locked (No locks available): make sure that no other process uses it"
        ]


@pytest.mark.parametrize("arguments", [[], ["--auto_resume"], ["torchrun"]])
def test_a_second_training_of_a_name_ends_with_one_line_and_touches_nothing(photographs, tmp_path, arguments):
    first = start(tmp_path, quick(photographs, train__total_iter=10**6, logger__save_checkpoint_freq=10**6), **ENV)
    try:
        wait_for(first, "iter:       2")
        before = list_files(tmp_path)
        command = [sys.executable, "-m", "tlw_basicsr.train", "-opt", "options.yml", *arguments]
        if "torchrun" in arguments:
            command[1:3] = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29611"]
            command[5:] = [str(ROOT / "tlw_basicsr/train.py"), "-opt", "options.yml", "--launcher", "pytorch"]
        done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=200)
        lines = [line for line in done.stderr.splitlines() if "error: " in line]
        assert len(lines) == 1, done.stderr
        assert f"experiments/tiny is in use by process {first.pid} on " in lines[0]
        assert done.returncode == (1 if "torchrun" in arguments else 2)
        if "torchrun" not in arguments:
            assert done.stderr.splitlines() == lines
        assert before.items() <= list_files(tmp_path).items()
        assert {p.name for p in (tmp_path / "experiments").iterdir()} == {"tiny", ".tiny.lock"}
    finally:
        first.kill()
        first.communicate()
    # gone with the process, however that has ended
    with hold_lock(tmp_path / "experiments/.tiny.lock", "it", pytest.fail):
        pass


# ------------------------------------------------------------------------------------------------- processes

SLOW = """
import os, signal, sys, time
from pathlib import Path
import tlw_basicsr
from tlw_basicsr.tools import prepare
def work(item):
    Path(f"worker{os.getpid()}").touch()
    time.sleep(100)
if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    prepare.in_parallel(work, range(2), 2, "slow")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_killed_preparation_leaves_no_workers(tmp_path, number):
    (tmp_path / "slow.py").write_text(SLOW)
    process = subprocess.Popen([sys.executable, "slow.py"], cwd=tmp_path, env=ENV, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 100
    while len(workers := list(tmp_path.glob("worker*"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    assert len(workers) == 2
    process.send_signal(number)
    process.wait(timeout=30)
    end = time.monotonic() + 10
    while any(alive(int(w.name[6:])) for w in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(int(w.name[6:])) for w in workers)


def alive(pid):
    """Whether it runs; one that nobody has waited for is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_killed_training_leaves_no_workers(photographs, tmp_path):
    changes = {
        "train__total_iter": 10**6,
        "logger__save_checkpoint_freq": 10**6,
        "datasets__train__num_worker_per_gpu": 2,
    }
    process = start(tmp_path, quick(photographs, **changes), **ENV)
    wait_for(process, "iter:       2")
    children = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) >= 2
    process.kill()
    process.communicate()
    end = time.monotonic() + 4  # torch's own look after 5 s, and only while they wait
    while any(map(alive, children)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, children))


# ------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["fifo", "device", "link", "folder"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "a.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/zero")
        if kind == "link":
            (tmp_path / "a.png").symlink_to(path)
            path = tmp_path / "a.png"
    for read in (lambda: load_file(path, "it"), lambda: image_size(path, "it"), lambda: read_picture(path),
                 lambda: read_options(str(path))):  # fmt: skip
        with pytest.raises(UserError, match=r"is not a regular file|can't be read"):
            read()


def test_a_file_without_permission_is_not_called_damaged(tmp_path):
    path = tmp_path / "a.pth"
    path.symlink_to(path)  # which root can't read either
    with pytest.raises(UserError, match=r"^it: .*a\.pth can't be read \(Too many levels of symbolic links\)$"):
        load_file(path, "it")
    with pytest.raises(UserError, match="does not exist"), open_regular(tmp_path / "b", "it"):
        pass


def test_a_large_image_is_tiled_by_default(capsys):
    from tlw_basicsr.commands.infer import main

    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "side of a tile in LR pixels, 512; 0: the whole image" in " ".join(capsys.readouterr().out.split())


def test_text_of_files_is_cleaned_and_cut():
    assert clean("a\x1b[2J\nERROR: b\x00") == "a\\x1b[2J ERROR: b\\x00" and len(clean("x" * 10**6)) < 5000


def test_a_large_yaml_is_refused_at_once(tmp_path):
    (tmp_path / "a.yml").write_text("a: [" + "0, " * 2_000_000 + "0]")
    with pytest.raises(UserError, match=r"^-opt: .*a\.yml has 6,000,006 bytes; accepted are at most 262,144"):
        read_options(str(tmp_path / "a.yml"))


# ------------------------------------------------------------------------------------------------- plugins


@pytest.mark.parametrize("command", ["infer", "evaluate", "export", "compare"])
def test_a_yamls_plugins_run_only_where_they_are_let(tmp_path, photographs, command):
    (tmp_path / "code.py").write_text("open('ran', 'w')")
    (tmp_path / "a.yml").write_text(yaml.safe_dump({**tiny_options(photographs), "plugins": ["code"]}))
    arguments = {
        "infer": ["x.png", "--opt", "a.yml"],
        "evaluate": ["--gt", str(photographs), "--scale", "2", "--opt", "a.yml", "--checkpoint", "a.pth"],
        "export": ["a.safetensors", "--opt", "a.yml"],
        "compare": ["a.yml", "--gt", str(photographs)],
    }[command]
    for more in ([], ["--allow-plugins"]):
        program = [sys.executable, "-m", "tlw_basicsr", command, *arguments, *more]
        done = subprocess.run(program, cwd=tmp_path, env=ENV, capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert (tmp_path / "ran").exists() == bool(more)
        assert more or done.stderr.startswith(
            "error: plugins: a.yml names 'code', code that would run; --allow-plugins"
        )


# ------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize(
    ("kept", "every", "taken"), [(1, 4, True), (3, 4, True), (3, 2, False), (2, 2, False), (1, 1, False)]
)
def test_gradients_kept_for_more_iterations_than_a_step_now_has_are_left_out(kept, every, taken):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
    take_gradients(optimizer, {"count": kept, "gradients": [torch.ones(2)]}, every)
    p = optimizer.param_groups[0]["params"][0]
    assert (p.grad is not None) == taken and getattr(optimizer, "accumulated", 0) == (kept if taken else 0)


@pytest.mark.parametrize("gradient", [torch.ones(3), torch.full((2,), torch.nan)])
def test_a_kept_gradient_must_fit(gradient):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(UserError, match="a kept gradient is not finite, or of another shape"):
        take_gradients(optimizer, {"count": 1, "gradients": [gradient]}, 2)


def test_fewer_iterations_to_a_step_on_a_resume_are_told(photographs, train):
    """Seven iterations of four to a step leave three gradients; of two to a step these were doubled."""
    opt = {"train__total_iter": 7, "logger__save_checkpoint_freq": 7}
    train(quick(photographs, **opt, train__accumulation_steps=4))
    opt = {"train__total_iter": 8, "logger__save_checkpoint_freq": 7, "train__accumulation_steps": 2}
    experiment = train(quick(photographs, **opt), "--auto_resume")
    assert "accumulation_steps is 2 now: the gradients of 3 iterations" in log_text(experiment)
    state = load_file(experiment / "training_states/8.state", "")
    assert [kept["count"] for kept in state["accumulated"]] == [1, 1]


# ------------------------------------------------------------------------------------------------- full disks


def test_tensorboards_full_disk_names_its_folder_without_a_traceback(photographs, tmp_path):
    """Its thread meets it; the next value that is written tells."""
    write_yaml(tmp_path, quick(photographs, logger__use_tb_logger=True, train__total_iter=60, logger__print_freq=1))
    script = (
        "import errno, os\nfrom tlw_basicsr.util.errors import run\nfrom tlw_basicsr.engine import logs, pipeline\n"
        "begin = logs.init_tb_logger\ndef fail(_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
        "def full(**more):\n    writer = begin(**more)\n"
        "    writer.file_writer.event_writer._async_writer._worker._record_writer.write = fail\n    return writer\n"
        "logs.init_tb_logger = full\n"
        f"run(lambda: pipeline.train_pipeline({str(tmp_path)!r}, ['-opt', 'options.yml']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"error: {tmp_path / 'tb_logger/tiny'} can't be read or written (No space left on device)" in done.stderr


# ------------------------------------------------------------------------------------------------- crafted states


def test_crafted_states_end_in_a_right_result_or_one_line(tmp_path):
    """A sample of what `scripts/state_test.py` has."""
    command = [sys.executable, str(ROOT / "scripts/state_test.py"), "--cases", "3", "--only"]
    for names in ("random", "BUILD", "numpy"):
        done = subprocess.run([*command, names], env=ENV, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        figures = json.loads(done.stdout)
        assert figures["cases"] >= 1 and not figures["wrong"]
        assert names == "random" or set(figures["ends"]) == {"the state before"}
