"""The processes of a run: how many a launcher has started, and whether they are one run.

A launcher says so in environment variables. Where nothing reads them, each process is a run of its own, and all of them
train into one folder.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from left_trainer.secret_values import shown_command


@dataclass(frozen=True)
class Launcher:
    """What starts the processes of a run, and the variables in which it says so.

    Args:
        name: For messages.
        count: Number of all processes.
        rank: Number of this one.
        unless: Further variables and values with which `count` says nothing of this process.
    """

    name: str
    count: str
    rank: str
    unless: tuple[str, str] | None = None


TORCHRUN = Launcher("torchrun", "WORLD_SIZE", "RANK")
MPIRUN, SRUN = "mpirun", "srun"
# The first one counts whose number is set: mpirun may use srun, and a script of either may use torchrun. A batch script
# of SLURM is one process, whatever the number of its tasks.
LAUNCHERS = (
    TORCHRUN,
    Launcher(MPIRUN, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    Launcher(MPIRUN, "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    Launcher(MPIRUN, "PMI_SIZE", "PMI_RANK"),
    Launcher(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    Launcher(SRUN, "SLURM_NTASKS", "SLURM_PROCID", unless=("ENVIRONMENT", "BATCH")),
)
ADDRESS = "MASTER_ADDR"
# What processes find each other by. On CPUs accelerate reads the variables of MPI too, and needs no local rank.
NEEDED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", ADDRESS, "MASTER_PORT")
NEEDED_ON_CPUS = {TORCHRUN.name: ("RANK", ADDRESS), MPIRUN: (ADDRESS,)}
# Set by `accelerate launch` where it starts one process itself; with several asked for it sets an address too.
STARTS_ONE = "ACCELERATE_USE_CPU"
AT_LEAST = 2
NUMBER_ASKED = re.compile(r"--num[_-]processes(?:=|\s+)(\d+)")


@dataclass(frozen=True)
class Launch:
    """The processes that were started together.

    Args:
        launcher: What started them.
        processes: How many.
    """

    launcher: Launcher
    processes: int


def launch_of(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """How this process was started with others; `None` where it was started alone."""
    for launcher in LAUNCHERS:
        count = environment.get(launcher.count, "")
        is_told = count.isdecimal() and (launcher is TORCHRUN or launcher.rank in environment)
        if is_told and not (launcher.unless and environment.get(launcher.unless[0]) == launcher.unless[1]):
            return Launch(launcher, int(count)) if int(count) > 1 else None
    return None


def alone(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a process that is started alone, by one of several."""
    told = {*NEEDED, "LOCAL_WORLD_SIZE", STARTS_ONE, *(name for each in LAUNCHERS for name in (each.count, each.rank))}
    return {name: value for name, value in environment.items() if name not in told}


def check_processes_can_meet(launch: Launch | None, on_cpu: bool, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse processes that would each train alone, or wait for each other in vain: before they are connected.

    Args:
        launch: How this process was started.
        on_cpu: Whether it trains on CPUs.
        environment: Of this process.

    Raises:
        ValueError: With the command that starts one run.
    """
    if launch is None:
        if STARTS_ONE in environment and ADDRESS in environment and TORCHRUN.count not in environment:
            raise ValueError(
                "accelerate launch was asked for several processes and has started one: without --multi_gpu it starts "
                f"several on several GPUs alone. Start them with\n    {one_run(_asked_of_accelerate())}\nIf one is "
                f"meant, pass --num_processes 1, and unset {ADDRESS}."
            )
        return
    needed = NEEDED_ON_CPUS.get(launch.launcher.name, NEEDED) if on_cpu else NEEDED
    missing = [name for name in needed if name not in environment]
    if missing:
        raise _not_one_run(launch, f"{', '.join(missing)} not set: they would not find each other")


def check_is_one_run(world_size: int, launch: Launch | None) -> None:
    """Refuse processes that were started together and are not connected.

    Args:
        world_size: Number of processes that are.
        launch: How this one was started.

    Raises:
        ValueError: With the command that starts one run.
    """
    if launch is not None and world_size != launch.processes:
        raise _not_one_run(launch, f"{world_size} in this run: each would train alone, and all into one folder")


def _not_one_run(launch: Launch, why: str) -> ValueError:
    return ValueError(
        f"{launch.launcher.count}={launch.processes}: {launch.launcher.name} has started {launch.processes} processes, "
        f"with {why}. Start one run with\n    {one_run(launch.processes, launch.launcher.name)}"
    )


def one_run(processes: int, launcher: str = TORCHRUN.name) -> str:
    """The command that runs this program in several processes, without secrets.

    Args:
        processes: How many.
        launcher: That this process was started by.
    """
    program = shown_command(sys.argv) if sys.argv and Path(sys.argv[0]).is_file() else "your_script.py"
    if launcher != SRUN:
        return f"torchrun --nproc_per_node={processes} {program}"
    machines = int(os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES", "1")))
    if machines == 1:
        return f"srun --ntasks=1 torchrun --nproc_per_node={processes} {program}"
    meeting = '"$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)":29500'
    return (
        f"srun --ntasks={machines} --ntasks-per-node=1 torchrun --nnodes={machines} "
        f"--nproc_per_node={-(-processes // machines)} --rdzv_backend=c10d --rdzv_id=$SLURM_JOB_ID "
        f"--rdzv_endpoint={meeting} {program}"
    )


def _asked_of_accelerate() -> int:
    """The number of processes on the command line of `accelerate launch`, which it does not pass on."""
    try:
        parent = psutil.Process().parent()
        found = NUMBER_ASKED.search(" ".join(parent.cmdline() if parent else ()))
    except psutil.Error:
        found = None
    return max(int(found[1]), AT_LEAST) if found else AT_LEAST
