"""Two CPU processes: the same networks on both, one set of files, exact gradients, and an end when one dies."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from tests.conftest import ROOT, tiny_options, write_yaml
from tests.helpers import EVERY_BASE, TRAIN, check_same_end, environment, log_lines, log_text, run_python, same
from tlw_basicsr.util.files import load_file

pytestmark = pytest.mark.slow  # each starts processes of its own

PLUGIN = """
import os, pathlib, torch
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY

@MODEL_REGISTRY.register()
class Watched(SRModel):
    '''Writes what every process holds, and its process number.'''

    def __init__(self, opt):
        super().__init__(opt)
        pathlib.Path(f"pid{opt['rank']}").write_text(str(os.getpid()))

    def save(self, epoch, current_iter):
        super().save(epoch, current_iter)
        held = {n: {k: v.clone() for k, v in self.get_bare_model(getattr(self, n)).state_dict().items()} for n in ("net_g", "net_w")}
        with torch.random.fork_rng(devices=[]):  # only a look at the random numbers
            held["noise"] = torch.rand(4)
        torch.save(held, f"held_{current_iter}_{self.opt['rank']}.pth")

    def validation(self, *args, **kwargs):
        pathlib.Path(f"validated{self.opt['rank']}").open("a").write("x")
        super().validation(*args, **kwargs)
"""


# its own server on a port that is free when it takes it
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
TORCHRUN += ["--nproc_per_node=2"]
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
LONG = {"train__total_iter": 100_000, "logger__save_checkpoint_freq": 100_000, "val__val_freq": 10_000}


def start(folder, *arguments):
    command = [*TORCHRUN, str(ROOT / "tlw_basicsr/train.py"), *TRAIN[2:], "--launcher", "pytorch", *arguments]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment(**NO_GPU), **output)


def wait_until(process, is_so):
    deadline = time.time() + 120
    while not is_so():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.1)


def is_gone(folder, rank):
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / f"pid{rank}").read_text()), 0)
    return True


def held(folder, iteration):
    """What both processes hold; the running averages of batch norm are each one's own."""
    both = [load_file(folder / f"held_{iteration}_{rank}.pth", "") for rank in (0, 1)]
    for one in both:
        one["net_w"] = {key: value for key, value in one["net_w"].items() if "running" not in key}
    return both


def torchrun(folder, *arguments):
    process = start(folder, *arguments)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output[-3000:]
    return output


def options(photographs, folder, **changes):
    (folder / "watched.py").write_text(PLUGIN)
    watched = {"plugins": ["watched"], "base_model": "Watched", "datasets__train__batch_size_per_gpu": 1}
    opt = tiny_options(photographs, **{**watched, **changes})
    write_yaml(folder, opt)
    return opt


def test_two_processes_hold_the_same_networks_and_one_writes(photographs, tmp_path):
    lengths = {"train__total_iter": 50, "logger__save_checkpoint_freq": 50, "logger__print_freq": 10}
    options(photographs, tmp_path, **lengths, val__val_freq=25)
    output = torchrun(tmp_path)
    one, other = held(tmp_path, 50)
    assert not torch.equal(one.pop("noise"), other.pop("noise"))  # each draws noise of its own
    assert same(one, other)

    experiment = tmp_path / "experiments/tiny"
    (log,) = experiment.glob("train_*.log")
    log = log.read_text()
    assert [int(line["iter"]) for line in log_lines(experiment)] == [10, 20, 25, 30, 40, 50]  # 25 has a validation
    assert output.count("iter:      50") == 1
    assert same(load_file(experiment / "models/net_g_50.pth", "")["params"], one["net_g"])
    assert log.count("Validation photos_val") == 2 and "k: " in log
    assert "3 iterations an epoch" in log  # 6 images, 2 processes, a batch of 1 on each


def test_two_processes_resume_with_the_same_bits(photographs, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = {"train__total_iter": 10, "logger__save_checkpoint_freq": 5, "val__val_freq": 100}
    changes["train__tlw"] = {"preset": "economy", "weight_interval": 3, "weight_crop": 12, "k_unit": "iter"}
    for folder in (whole, cut):
        folder.mkdir()
        options(photographs, folder, **changes)
    torchrun(whole)
    one, other = held(whole, 10)
    assert same(one["net_w"], other["net_w"])
    means = [load_file(whole / f"held_10_{rank}.pth", "")["net_w"]["conv.1.running_mean"] for rank in (0, 1)]
    assert not torch.equal(*means)  # each had its E steps on a part of its own images
    torchrun(cut, "--force_yml", "train:total_iter=5")
    assert "Resuming after iteration 5" in torchrun(cut, "--auto_resume")
    check_same_end(whole / "experiments/tiny", cut / "experiments/tiny", 10)


def test_when_one_dies_the_others_end_and_the_last_checkpoint_is_whole(photographs, tmp_path):
    options(photographs, tmp_path, **{**LONG, "logger__save_checkpoint_freq": 20})
    process = start(tmp_path)
    states = tmp_path / "experiments/tiny/training_states"
    wait_until(process, lambda: list(states.glob("[0-9]*.state")))
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "SIGKILL" in output or "Signal 9" in output  # the message says which process died of what
    assert is_gone(tmp_path, 0)
    newest = max(states.glob("[0-9]*.state"), key=lambda p: int(p.stem))
    assert load_file(newest, "")["iter"] == int(newest.stem)
    for net in "gw":
        assert load_file(tmp_path / f"experiments/tiny/models/net_{net}_{newest.stem}.pth", "")["params"]


def test_one_process_validates_a_network_with_buffers(photographs, tmp_path):
    """Without EMA the trained network itself is validated; its buffers must not wait for the other process."""
    changes = {"train__ema_decay": 0, "train__total_iter": 5, "val__val_freq": 2, **EVERY_BASE["SwinIRModel"]}
    changes |= {"base_model": "SwinIRModel", "datasets__train__batch_size_per_gpu": 1}
    write_yaml(tmp_path, tiny_options(photographs, **changes))
    assert torchrun(tmp_path).count("Validation photos_val") == 3


BAD = """
from basicsr.utils.registry import MODEL_REGISTRY
from watched import Watched

@MODEL_REGISTRY.register()
class BadOnce(Watched):
    '''The second process gets an image that is not finite in its third iteration.'''

    fed = 0

    def feed_data(self, data):
        super().feed_data(data)
        self.fed += 1
        if self.opt["rank"] == 1 and self.fed == 3:
            self.lq[0, 0, 0, 0] = float("nan")
"""


def test_a_number_that_is_not_finite_in_one_process_is_a_step_that_both_leave_out(photographs, tmp_path):
    changes = {"train__total_iter": 6, "logger__save_checkpoint_freq": 1, "val__val_freq": 100}
    (tmp_path / "bad.py").write_text(BAD)
    options(photographs, tmp_path, **changes, plugins=["watched", "bad"], base_model="BadOnce")
    [line] = [line for line in torchrun(tmp_path).splitlines() if "not finite" in line]
    assert "Iteration 3: not finite: " in line and "gradient of optimizer_" in line  # of the first process, too
    assert "; lq, " in line
    nets = {}
    for i in (2, 3, 4, 6):
        one, other = ({net: both[net] for net in ("net_g", "net_w")} for both in held(tmp_path, i))
        assert same(one, other) and all(v.isfinite().all() for net in one.values() for v in net.values())
        nets[i] = one
    for net in ("net_g", "net_w"):
        assert same(nets[2][net], nets[3][net]) and not same(nets[3][net], nets[4][net])
    state = load_file(tmp_path / "experiments/tiny/training_states/6.state", "")
    assert state["guard"] == {"skipped": 1, "in_row": 0}


def test_sigterm_to_the_launcher_saves_once_and_ends_all(photographs, tmp_path):
    options(photographs, tmp_path, **LONG)
    process = start(tmp_path)
    experiment = tmp_path / "experiments/tiny"
    wait_until(process, lambda: "iter:      10" in log_text(experiment))
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=100)[0]
    assert "Stopped by SIGTERM after iteration" in output
    [newest] = (experiment / "training_states").glob("[0-9]*.state")
    assert load_file(newest, "")["iter"] == int(newest.stem) >= 10
    assert is_gone(tmp_path, 0) and is_gone(tmp_path, 1)


WORKER = """
import os, sys, time, torch, torch.distributed as dist
import tlw_basicsr, yaml
from tlw_basicsr.models import build_model
from tlw_basicsr.engine.distributed import find_rank, join_group

opt = yaml.safe_load(open("options.yml"))
distributed = sys.argv[1] == "two"
rank, world = find_rank("pytorch" if distributed else "none", False)
if distributed:
    join_group(False)
opt |= {"is_train": True, "dist": distributed, "rank": rank, "world_size": world}
opt["path"] |= {"models": ".", "training_states": "."}
torch.manual_seed(0)
model = build_model(opt)
model.set_epoch(0)
model.net_w.eval()  # batch norm fixed
generator = torch.Generator().manual_seed(1)
lq, gt = torch.rand(4, 3, 8, 8, generator=generator), torch.rand(4, 3, 16, 16, generator=generator)
rows = slice(2 * rank, 2 * rank + 2) if distributed else slice(0, 4)

plain_rand, noise = torch.rand, torch.Generator().manual_seed(2)
def rand(shape, **_):  # the noise of the joined batch, of which each process takes its rows
    whole = plain_rand((shape[0], 4, *shape[2:]), generator=noise)
    return whole[:, rows]
torch.rand = rand

gradients = {}
def keep(name):
    net = getattr(model, "net_" + name)
    def hook(*_):
        bare = model.get_bare_model(net)
        gradients[name] = {n: p.grad.clone() for n, p in bare.named_parameters()}
    return hook
for name in "gw":
    getattr(model, "optimizer_" + name).register_step_pre_hook(keep(name))
model.feed_data({"lq": lq[rows], "gt": gt[rows]})
model.optimize_parameters(1)
if rank == 0:
    torch.save(gradients, sys.argv[1] + ".pth")
if distributed:  # a process that ends while the other one still reads from it would fail that one
    dist.barrier()
    time.sleep(1)
    os._exit(0)  # gloo's threads may abort Python's own end
"""


def test_gradients_of_both_networks_are_those_of_the_joined_batch(photographs, tmp_path):
    write_yaml(tmp_path, tiny_options(photographs, train__ema_decay=0))
    (tmp_path / "worker.py").write_text(WORKER)
    for command in (["worker.py", "one"], [*TORCHRUN[1:], "worker.py", "two"]):
        run_python(tmp_path, *command, **NO_GPU)
    one, two = (load_file(tmp_path / f"{name}.pth", "") for name in ("one", "two"))
    for net in "gw":
        for name, gradient in one[net].items():
            scale = gradient.abs().max().item()
            assert torch.allclose(two[net][name], gradient, rtol=1e-4, atol=1e-4 * scale + 1e-9), (net, name)


def test_slurm(photographs, tmp_path):
    """Two processes with slurm's variables, and a scontrol that names this machine."""
    options(photographs, tmp_path, train__total_iter=3, logger__save_checkpoint_freq=3)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 127.0.0.1\necho 127.0.0.2\n")
    scontrol.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MASTER_PORT": str(port)}
    shared |= {"SLURM_NTASKS": "2", "SLURM_NODELIST": "local[1-2]", **NO_GPU}
    command = [sys.executable, *TRAIN, "--launcher", "slurm"]
    processes = []
    for rank in "01":
        env = environment(**shared, SLURM_PROCID=rank, SLURM_LOCALID=rank)
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    one, other = held(tmp_path, 3)
    assert same(one["net_g"], other["net_g"])


@pytest.mark.parametrize(("launcher", "variable"), [("pytorch", "LOCAL_RANK"), ("slurm", "SLURM_NODELIST")])
def test_a_launcher_without_its_variables_is_one_line(photographs, tmp_path, launcher, variable, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM", "LOCAL_RANK", "RANK"))]:
        monkeypatch.delenv(name)
    write_yaml(tmp_path, tiny_options(photographs))
    done = run_python(tmp_path, *TRAIN, "--launcher", launcher, code=2)
    assert f"--launcher {launcher}: {variable} is not set" in done.stderr


def test_an_error_before_the_training_ends_all_processes_with_one_line(photographs, tmp_path):
    options(photographs, tmp_path, network_g__num_in_ch=1)
    process = start(tmp_path)
    output = process.communicate(timeout=240)[0]
    assert process.returncode and not (tmp_path / "experiments").exists()
    assert output.count("error: network_g: EDSR fails in the first iteration") == 1, output[-3000:]
