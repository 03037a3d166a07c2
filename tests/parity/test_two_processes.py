"""Two processes give the loss and gradient norm of one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import two_processes as script
from processes import ENVIRONMENT

TYPES = ("t5", "llama")
# Rows of a process in a batch, batches of a step, and what is special.
CASES = ((4, 1, "sorted"), (2, 2, "sorted"), (4, 1, "in_order"), (4, 1, "streamed"), (2, 2, "taught"))


@pytest.fixture(scope="module")
def two(python, tmp_path_factory) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What two processes end with, by model type and case; one launch for all."""
    output = tmp_path_factory.mktemp("two") / "results.json"
    cases = [(model_type, *case) for model_type in TYPES for case in CASES]
    launch = [python, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", script.__file__]
    result = subprocess.run([*launch, str(output), json.dumps(cases)], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-4000:]
    return dict(zip(cases, json.loads(output.read_text()), strict=True))


def own_tokens(rows: list[list[int]]) -> list[list[int]]:
    """Rows without what fills them up to the longest one of their batch."""
    return [[token for token in row if token > 0] for row in rows]


@pytest.mark.parametrize("model_type", TYPES)
def test_two_processes_agree_with_one(model_type, two, tmp_path):
    one = script.run(tmp_path, model_type, 8, 1)
    for case in ((4, 1, "sorted"), (2, 2, "sorted")):
        found = two[model_type, *case]
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert found["gradient_norms"] == pytest.approx(one["gradient_norms"], rel=1e-5)
        # 5 rows: the one that fills up the last batch is not predicted twice
        assert own_tokens(found["labels"]) == own_tokens(one["labels"])
        assert own_tokens(found["predictions"]) == own_tokens(one["predictions"])
        assert found["chrf"] == pytest.approx(one["chrf"])
        assert found["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert found["loss_alone"] == pytest.approx(one["loss"], rel=1e-6)
        assert found["by_length"] == one["by_length"] == 1


@pytest.mark.parametrize("model_type", TYPES)
def test_two_processes_evaluate_by_length_as_in_order(model_type, two):
    by_length, in_order = (two[model_type, 4, 1, kind] for kind in ("sorted", "in_order"))
    assert (by_length["by_length"], in_order["by_length"]) == (1, 0)
    for name in ("predictions", "labels", "chrf"):
        assert by_length[name] == in_order[name]
    assert by_length["loss"] == pytest.approx(in_order["loss"], rel=1e-6)


@pytest.mark.parametrize("model_type", TYPES)
def test_two_processes_read_a_stream_as_one_reads_it(model_type, two, tmp_path):
    """Batches of several lengths included, which the first process could not join for the others."""
    one = script.run(tmp_path, model_type, 8, 1, "streamed")
    assert two[model_type, 4, 1, "streamed"]["losses"] == pytest.approx(one["losses"], rel=1e-5)


def test_the_fused_lora_pass_under_fsdp2(python):
    launch = [python, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    result = subprocess.run(
        [*launch, str(Path(__file__).with_name("sharded_lora_script.py"))],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("model_type", TYPES)
def test_two_processes_learn_from_a_teacher_as_one(model_type, two, tmp_path):
    one, found = script.run(tmp_path, model_type, 8, 1, "taught"), two[model_type, 2, 2, "taught"]
    assert one["projections"]
    for name in ("losses", "gradient_norms"):
        assert found[name] == pytest.approx(one[name], rel=1e-5)
    torch.testing.assert_close(torch.tensor(found["projections"]), torch.tensor(one["projections"]))
