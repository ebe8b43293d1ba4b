"""Joining a distributed run: GPUs by nccl, CPU processes by gloo."""

import os
import subprocess

import torch
import torch.distributed as dist

from tlw_basicsr.util.errors import UserError

LAUNCHERS = ("none", "pytorch", "slurm")


def init_distributed(
    launcher: str, use_gpu: bool, backend: str | None = None, port: int | None = None
) -> tuple[int, int]:
    """Join the process group of ``torchrun`` (``'pytorch'``) or ``srun`` (``'slurm'``).

    Args:
        launcher: one of :data:`LAUNCHERS`; ``'none'`` does nothing.
        use_gpu: whether the networks are on GPUs.
        backend: torch.distributed's; None for nccl with a GPU and gloo without.
        port: the first process's under slurm; default MASTER_PORT, else 29500.

    Returns:
        Rank and number of processes.

    Raises:
        UserError: the launcher has not set its environment variables.
    """
    if launcher == "none":
        return 0, 1
    try:
        if launcher == "slurm":
            _environment_of_slurm(port)
        local_rank = int(os.environ["LOCAL_RANK"])
        gpu = use_gpu and torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        if not gpu or backend is None:
            backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend=backend)
    except KeyError as error:
        starter = {"pytorch": "torchrun", "slurm": "srun"}[launcher]
        raise UserError(f"--launcher {launcher}: {error.args[0]} is not set; start it by {starter}") from error
    return dist.get_rank(), dist.get_world_size()


def _environment_of_slurm(port: int | None) -> None:
    """Give slurm's variables torch's names."""
    env = os.environ
    nodes = subprocess.run(
        ["scontrol", "show", "hostnames", env["SLURM_NODELIST"]], capture_output=True, text=True, check=True
    )
    env["MASTER_ADDR"] = nodes.stdout.split()[0]
    env["MASTER_PORT"] = str(port or env.get("MASTER_PORT", 29500))
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
