"""Processes that a launcher has started are one run, or are refused with the command that makes them one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from left_trainer import processes
from left_trainer.processes import alone, check_is_one_run, check_processes_can_meet, launch_of
from processes import ENVIRONMENT

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
BATCH = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"}
# Prints how many processes the arguments know of, and loads a model that does not exist where nothing is refused.
SCRIPT = """
from left_trainer import LeftTrainer, LeftTrainingArguments
args = LeftTrainingArguments(output_dir="run", report_to="none")
print(f"{args.world_size} processes on {args.device.type}\\n", end="", flush=True)
"""


@pytest.mark.parametrize(
    ("environment", "started"),
    [
        ({}, None),
        (TORCHRUN, ("torchrun", 2)),
        ({**TORCHRUN, "WORLD_SIZE": "1"}, None),
        (OPEN_MPI, ("mpirun", 2)),
        ({"PMI_SIZE": "3", "PMI_RANK": "0"}, ("mpirun", 3)),
        ({"MV2_COMM_WORLD_SIZE": "3", "MV2_COMM_WORLD_RANK": "0"}, ("mpirun", 3)),
        (SRUN, ("srun", 4)),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, ("srun", 2)),
        (BATCH, None),
        ({**BATCH, "SLURM_STEP_NUM_TASKS": "2"}, ("srun", 2)),
        ({**SRUN, **TORCHRUN}, ("torchrun", 2)),
        ({"SLURM_NTASKS": "2"}, None),  # of salloc's shell
    ],
)
def test_launchers_are_told_by_what_they_set(environment, started):
    launch = launch_of(environment)
    assert (launch and (launch.launcher.name, launch.processes)) == started
    assert launch_of(alone(environment)) is None


@pytest.mark.parametrize(
    ("environment", "on_cpu", "missing"),
    [
        (TORCHRUN, False, None),
        ({**TORCHRUN, "LOCAL_RANK": None}, False, "LOCAL_RANK"),
        ({**TORCHRUN, "LOCAL_RANK": None}, True, None),
        ({**TORCHRUN, "RANK": None, "MASTER_ADDR": None}, True, "RANK, MASTER_ADDR"),
        (OPEN_MPI, True, "MASTER_ADDR"),
        ({**OPEN_MPI, "MASTER_ADDR": "node1"}, True, None),
        ({**OPEN_MPI, "MASTER_ADDR": "node1"}, False, "WORLD_SIZE, RANK, LOCAL_RANK, MASTER_PORT"),
        (SRUN, True, "WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_processes_that_cannot_meet_are_refused(environment, on_cpu, missing):
    environment = {name: value for name, value in environment.items() if value is not None}
    launch = launch_of(environment)
    if missing is None:
        check_processes_can_meet(launch, on_cpu, environment)
        return
    with pytest.raises(ValueError, match=f"with {missing} not set") as error:
        check_processes_can_meet(launch, on_cpu, environment)
    assert f"torchrun --nproc_per_node={launch.processes}" in str(error.value)


def test_processes_that_are_not_connected_are_refused(monkeypatch, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("")
    monkeypatch.setattr(sys, "argv", [str(script), "--hub_token", "secret", "--seed", "3"])
    check_is_one_run(2, launch_of(TORCHRUN))
    check_is_one_run(1, None)
    with pytest.raises(ValueError, match="WORLD_SIZE=2: torchrun has started 2 processes, with 1 in this run") as error:
        check_is_one_run(1, launch_of(TORCHRUN))
    assert f"torchrun --nproc_per_node=2 {script} --seed 3" in str(error.value)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    with pytest.raises(ValueError, match="--nnodes=2 --nproc_per_node=2 --rdzv_backend=c10d"):
        check_is_one_run(1, launch_of(SRUN))


def test_accelerate_that_starts_one_process_is_refused(monkeypatch):
    monkeypatch.setattr(processes, "_asked_of_accelerate", lambda: 3)
    with pytest.raises(ValueError, match="torchrun --nproc_per_node=3"):
        check_processes_can_meet(None, True, {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"})
    check_processes_can_meet(None, True, {"ACCELERATE_USE_CPU": "True"})
    check_processes_can_meet(None, True, {"MASTER_ADDR": "127.0.0.1"})


@pytest.mark.parametrize(
    ("launcher", "environment", "said"),
    [
        (["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"], {}, 2 * "2 processes on cpu\n"),
        (
            ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"],
            {},
            2 * "2 processes on cpu\n",
        ),
        (["-m", "accelerate.commands.launch", "--num_processes=1"], {}, "1 processes on cpu\n"),
        (["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2"], {}, "started one"),
        ([], SRUN, "srun has started 4 processes"),
        ([], OPEN_MPI, "mpirun has started 2 processes"),
    ],
)
def test_every_launcher_starts_one_run_or_is_refused(python, tmp_path, launcher, environment, said):
    (tmp_path / "script.py").write_text(SCRIPT)
    result = subprocess.run(
        [python, *launcher, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, **environment},
    )
    if "started" in said:
        assert result.returncode != 0
        assert said in result.stderr
        assert "torchrun --nproc_per_node=" in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert result.stdout == said
