"""Two processes give the loss and gradient norm of one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from processes import ENVIRONMENT

SCRIPT = Path(__file__).with_name("two_processes_script.py")


def run(
    python: str,
    model_type: str,
    processes: int,
    batch_size: int,
    accumulation: int,
    folder: Path,
    sort: str = "sorted",
) -> dict[str, Any]:
    output = folder / f"{processes}-{batch_size}-{accumulation}-{sort}.json"
    launch = [python, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = [*(launch if processes > 1 else [python]), str(SCRIPT), model_type]
    subprocess.run(
        [*command, str(batch_size), str(accumulation), sort, str(output)],
        check=True,
        capture_output=True,
        env=ENVIRONMENT,
    )
    return json.loads(output.read_text())


def own_tokens(rows: list[list[int]]) -> list[list[int]]:
    """Rows without what fills them up to the longest one of their batch."""
    return [[token for token in row if token > 0] for row in rows]


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_two_processes_agree_with_one(model_type, python, tmp_path):
    one = run(python, model_type, 1, 8, 1, tmp_path)
    for batch_size, accumulation in ((4, 1), (2, 2)):
        two = run(python, model_type, 2, batch_size, accumulation, tmp_path)
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert two["gradient_norms"] == pytest.approx(one["gradient_norms"], rel=1e-5)
        # 5 rows: the one that fills up the last batch is not predicted twice
        assert own_tokens(two["labels"]) == own_tokens(one["labels"])
        assert own_tokens(two["predictions"]) == own_tokens(one["predictions"])
        assert two["chrf"] == pytest.approx(one["chrf"])
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert two["loss_alone"] == pytest.approx(one["loss"], rel=1e-6)
        assert two["by_length"] == one["by_length"] == 1


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_two_processes_evaluate_by_length_as_in_order(model_type, python, tmp_path):
    by_length, in_order = (run(python, model_type, 2, 4, 1, tmp_path, sort) for sort in ("sorted", "in_order"))
    assert (by_length["by_length"], in_order["by_length"]) == (1, 0)
    for name in ("predictions", "labels", "chrf"):
        assert by_length[name] == in_order[name]
    assert by_length["loss"] == pytest.approx(in_order["loss"], rel=1e-6)


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_two_processes_read_a_stream_as_one_reads_it(model_type, python, tmp_path):
    """Batches of several lengths included, which the first process could not join for the others."""
    one, two = (run(python, model_type, number, 8 // number, 1, tmp_path, "streamed") for number in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)


def test_the_fused_lora_pass_under_fsdp2(python):
    launch = [python, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    result = subprocess.run(
        [*launch, str(SCRIPT.with_name("sharded_lora_script.py"))],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_two_processes_learn_from_a_teacher_as_one(model_type, python, tmp_path):
    one = run(python, model_type, 1, 8, 1, tmp_path, sort="taught")
    two = run(python, model_type, 2, 2, 2, tmp_path, sort="taught")
    assert one["projections"]
    for name in ("losses", "gradient_norms"):
        assert two[name] == pytest.approx(one[name], rel=1e-5)
    torch.testing.assert_close(torch.tensor(two["projections"]), torch.tensor(one["projections"]))
