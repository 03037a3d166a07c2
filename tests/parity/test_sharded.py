"""FSDP2 on two processes ends with what one process ends with: losses, texts, saved weights, and a run that goes on.

`long`: every method of the registry, over both families.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import sharded_runs as script
from left_trainer import LeftTrainer, list_methods
from processes import ENVIRONMENT
from tiny import tiny_model, tiny_rows

# They draw numbers in every pass, or mix the rows that are passed at once: other ones in every process.
OF_A_PROCESS = ("poly", "pvera", "lily")
# Their start, or their least directions, are nothing but rounding.
TOLERANCE = {"deft": 3e-2, "fourierft": 1e-2}
# Adam makes a full step of a gradient that is nothing but rounding, as of the biases of keys.
ROUNDING = {"bitfit": 5e-2, "full, gpt2": 5e-2, "deft": 3e-2, "fourierft": 1e-2}


def in_two_processes(python: str, folder: Path, names: list[str]) -> dict[str, Any]:
    launch = [python, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*launch, script.__file__, str(folder), json.dumps(names)]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=1500)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


def check_equal(folder: Path, two: Path, found: dict[str, Any], name: str, given: dict[str, Any]) -> None:
    expected, method = script.run(folder, 1, given), given.get("peft_method", "full")
    assert found.keys() == expected.keys()
    if method in OF_A_PROCESS:
        return
    for key, value in expected.items():
        assert found[key] == (
            value if key.startswith(("texts", "fell back")) else pytest.approx(value, rel=TOLERANCE.get(method, 1e-4))
        ), f"{name}: {key}"
    weights, own = script.saved_weights(two), script.saved_weights(folder)
    assert weights.keys() == own.keys(), name
    assert own, name
    for key, tensor in own.items():
        atol = ROUNDING.get(name.removesuffix(", scored before"), ROUNDING.get(method, 2e-4))
        torch.testing.assert_close(weights[key], tensor, rtol=1e-3, atol=atol, msg=f"{name}: {key}")


@pytest.fixture(scope="module")
def two(python, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    return folder, in_two_processes(python, folder, list(script.RUNS))


@pytest.mark.parametrize("name", script.RUNS)
def test_a_sharded_run_ends_as_one_of_one_process(two, tmp_path, name):
    folder, found = two
    check_equal(tmp_path / "one", folder / name, found[name], name, script.RUNS[name])


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # FRoD has a sparse core
def test_every_method_trains_sharded_as_in_one_process(python, tmp_path):
    runs = {**script.MORE_RUNS, **script.METHODS}
    found = in_two_processes(python, tmp_path, list(runs))
    for name, given in runs.items():
        check_equal(tmp_path / "one" / name, tmp_path / name, found[name], name, given)


@pytest.mark.parametrize("method", [method.name for method in list_methods() if not method.supports("sharded")])
def test_a_method_that_cannot_be_sharded_is_refused(make_args, monkeypatch, method):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match=r"sharded .*ddp\.yaml"):
        LeftTrainer(tiny_model("llama"), make_args(peft_method=method), train_dataset=tiny_rows())


def test_the_first_version_of_fsdp_is_refused(make_args, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        LeftTrainer(tiny_model("llama"), make_args(), train_dataset=tiny_rows())
