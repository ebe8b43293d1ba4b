"""Starts a distributed run: GPUs by nccl, CPU processes by gloo."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from tlw_basicsr.models.states import gather
from tlw_basicsr.util.errors import UserError
from tlw_basicsr.util.kinds import Options

LAUNCHERS = ("none", "pytorch", "slurm")


def find_rank(launcher: str, use_gpu: bool, port: int | None = None) -> tuple[int, int]:
    """Return rank and number of processes by the launcher's environment, and choose this process's GPU."""
    if launcher == "none":
        return 0, 1
    try:
        if launcher == "slurm":
            _translate_slurm(port)
        local_rank = int(os.environ["LOCAL_RANK"])
        if use_gpu and torch.cuda.is_available():
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except KeyError as error:
        starter = {"pytorch": "torchrun", "slurm": "srun"}[launcher]
        raise UserError(f"--launcher {launcher}: {error.args[0]} is not set; start it by {starter}") from error


def join_group(use_gpu: bool, backend: str | None = None) -> None:
    """Join the process group that :func:`find_rank` has found; by default with nccl on GPUs, else with gloo."""
    gpu = use_gpu and torch.cuda.is_available()
    dist.init_process_group(backend=(backend or "nccl") if gpu else "gloo")


@contextmanager
def join_after(opt: Options) -> Iterator[None]:
    """Join the other processes after a check, see :func:`fail_together`."""
    failure = None
    try:
        yield
    except UserError as error:
        failure = error
    if opt["dist"]:
        join_group(opt["num_gpu"] != 0, (opt.get("dist_params") or {}).get("backend"))
    fail_together(opt, failure)


def fail_together(opt: Options, failure: Exception | None) -> None:
    """End all processes if one has failed: the first of these with its error, the others silently with exit code 2."""
    failures = gather(opt, failure is not None)
    if failure and failures.index(True) == opt["rank"]:
        raise failure
    if any(failures):
        sys.exit(2)


def _translate_slurm(port: int | None) -> None:
    """Give slurm's variables the names that torch reads."""
    env = os.environ
    nodes = subprocess.run(
        ["scontrol", "show", "hostnames", env["SLURM_NODELIST"]], capture_output=True, text=True, check=True
    )
    env["MASTER_ADDR"] = nodes.stdout.split()[0]
    env["MASTER_PORT"] = str(port or env.get("MASTER_PORT", 29500))
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
