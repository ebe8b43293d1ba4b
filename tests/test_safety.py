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

from tests.conftest import ROOT, tiny_options, write_yaml
from tests.helpers import TRAIN, environment, log_text, quick, refused, run_python, start, wait_for
from tlw_basicsr import UserError, commands
from tlw_basicsr.data.images import image_size, read_picture
from tlw_basicsr.engine.options import read_options
from tlw_basicsr.models.states import take_gradients
from tlw_basicsr.util.errors import clean
from tlw_basicsr.util.files import hold_lock, load_file, open_regular

ENDLESS = {"train__total_iter": 10**6, "logger__save_checkpoint_freq": 10**6}


def list_files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"}


def test_a_lock_is_one_processs_alone_and_says_whose(tmp_path):
    path = tmp_path / "x.lock"
    message = rf"^it is in use by process {os.getpid()} on \S+ since 20\d\d-.*; its lock is"
    with hold_lock(path, "it", pytest.fail) as held:
        refused(message, hold_lock(path, "it", pytest.fail).__enter__)
        child = os.fork()
        if not child:  # a worker that outlives this process does not hold it
            closed = False
            try:
                os.fstat(held[0])
            except OSError as error:
                closed = error.errno == errno.EBADF
            os._exit(0 if closed else 1)
        assert os.waitpid(child, 0)[1] == 0
    with hold_lock(path, "it", pytest.fail):
        pass


def test_where_there_are_no_locks_it_is_a_warning(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("tlw_basicsr.util.files.fcntl.flock", fail)
    warnings = []
    with hold_lock(tmp_path / "x.lock", "it", warnings.append) as held:
        assert held == ()
    assert warnings == ["it can't be locked (No locks available): make sure that no other process uses it"]


def test_a_second_training_of_a_name_ends_with_one_line_and_touches_nothing(photographs, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29611"]
    torchrun += [ROOT / "tlw_basicsr/train.py", *TRAIN[2:], "--launcher", "pytorch"]
    first = start(tmp_path, quick(photographs, **ENDLESS))
    try:
        wait_for(first, "iter:       2")
        before = list_files(tmp_path)
        for command in (TRAIN, (*TRAIN, "--auto_resume"), torchrun):
            done = run_python(tmp_path, *command, code=1 if command is torchrun else 2)
            lines = [line for line in done.stderr.splitlines() if "error: " in line]
            assert len(lines) == 1, done.stderr
            assert f"experiments/tiny is in use by process {first.pid} on " in lines[0]
            if command is not torchrun:
                assert done.stderr.splitlines() == lines
            assert before.items() <= list_files(tmp_path).items()
            assert {p.name for p in (tmp_path / "experiments").iterdir()} == {"tiny", ".tiny.lock"}
    finally:
        first.kill()
        first.communicate()
    # gone with the process, however that has ended
    with hold_lock(tmp_path / "experiments/.tiny.lock", "it", pytest.fail):
        pass


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
    process = subprocess.Popen([sys.executable, "slow.py"], cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    assert wait_until(lambda: len(list(tmp_path.glob("worker*"))) == 2, 100)
    workers = [int(path.name[6:]) for path in tmp_path.glob("worker*")]
    process.send_signal(number)
    process.wait(timeout=30)
    assert wait_until(lambda: not any(map(alive, workers)), 10)


def wait_until(is_so, seconds):
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.05)
    return is_so()


def alive(pid):
    """Whether it runs; one that nobody has waited for is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_killed_training_leaves_no_workers(photographs, tmp_path):
    process = start(tmp_path, quick(photographs, **ENDLESS, datasets__train__num_worker_per_gpu=2))
    wait_for(process, "iter:       2")
    children = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) >= 2
    process.kill()
    process.communicate()
    assert wait_until(lambda: not any(map(alive, children)), 4)  # torch's own look after 5 s, and only while they wait


@pytest.mark.parametrize("kind", ["fifo", "device", "link", "folder"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "a.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/dev/zero")
    for read in (load_file, image_size, lambda path, _: read_picture(path), lambda path, _: read_options(str(path))):
        refused(r"is not a regular file|can't be read", read, path, "it")


def test_a_file_without_permission_is_not_called_damaged(tmp_path):
    path = tmp_path / "a.pth"
    path.symlink_to(path)  # which root can't read either
    refused(r"^it: .*a\.pth can't be read \(Too many levels of symbolic links\)$", load_file, path, "it")
    with pytest.raises(UserError, match="does not exist"), open_regular(tmp_path / "b", "it"):
        pass


def test_text_of_files_is_cleaned_and_cut():
    assert clean("a\x1b[2J\nERROR: b\x00") == "a\\x1b[2J ERROR: b\\x00" and len(clean("x" * 10**6)) < 5000


COMMANDS = {
    "infer": ["x.png", "--opt", "a.yml"],
    "evaluate": ["--gt", "photographs", "--scale", "2", "--opt", "a.yml", "--checkpoint", "a.pth"],
    "export": ["a.safetensors", "--opt", "a.yml"],
    "compare": ["a.yml", "--gt", "photographs"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_yamls_plugins_run_only_where_they_are_allowed(tmp_path, photographs, command):
    (tmp_path / "photographs").symlink_to(photographs)
    (tmp_path / "code.py").write_text("open('ran', 'w')")
    write_yaml(tmp_path, tiny_options(photographs, plugins=["code"]), "a.yml")
    for more in ([], ["--allow-plugins"]):
        done = run_python(tmp_path, "-m", "tlw_basicsr", command, *COMMANDS[command], *more, code=2)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert (tmp_path / "ran").exists() == bool(more)
        message = "error: plugins: a.yml names 'code', code that would run; --allow-plugins"
        assert more or done.stderr.startswith(message)


def test_the_page_on_trust_names_every_command():
    text = (ROOT / "docs/security.md").read_text("utf-8")
    assert [name for name in commands.COMMANDS if f"`{name}`" not in text and f"`tlw {name}`" not in text] == []


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
    optimizer, kept = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))]), {"count": 1, "gradients": [gradient]}
    refused("a kept gradient is not finite, or of another shape", take_gradients, optimizer, kept, 2)


def test_fewer_iterations_to_a_step_on_a_resume_are_reported(photographs, train):
    """Seven iterations of four to a step leave three gradients; of two to a step these were doubled."""
    opt = {"train__total_iter": 7, "logger__save_checkpoint_freq": 7}
    train(quick(photographs, **opt, train__accumulation_steps=4))
    opt["train__total_iter"] = 8
    experiment = train(quick(photographs, **opt, train__accumulation_steps=2), "--auto_resume")
    assert "accumulation_steps is 2 now: the gradients of 3 iterations" in log_text(experiment)
    state = load_file(experiment / "training_states/8.state", "")
    assert [kept["count"] for kept in state["accumulated"]] == [1, 1]


FULL = """
import errno, os
from tlw_basicsr.engine import logs, pipeline
from tlw_basicsr.util.errors import run
begin = logs.init_tb_logger
def fail(_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
def full(**more):
    writer = begin(**more)
    writer.file_writer.event_writer._async_writer._worker._record_writer.write = fail
    return writer
logs.init_tb_logger = full
run(lambda: pipeline.train_pipeline(os.getcwd(), ["-opt", "options.yml"]))
"""


def test_tensorboards_full_disk_names_its_folder_without_a_traceback(photographs, tmp_path):
    """Its thread meets it; the next value that is written reports it."""
    write_yaml(tmp_path, quick(photographs, logger__use_tb_logger=True, train__total_iter=60))
    done = run_python(tmp_path, "-c", FULL, code=2)
    assert "Traceback" not in done.stderr, done.stderr
    assert f"error: {tmp_path / 'tb_logger/tiny'} can't be read or written (No space left on device)" in done.stderr


@pytest.mark.slow
def test_crafted_states_end_in_a_right_result_or_one_line(tmp_path):
    """A sample of what `scripts/state_test.py` has."""
    done = run_python(tmp_path, ROOT / "scripts/state_test.py", "--cases", 3, "--only", "random")
    figures = json.loads(done.stdout)
    assert figures["cases"] == 3 and not figures["wrong"]
