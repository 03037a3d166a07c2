"""Two processes give the loss and gradient norm of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("two_processes_script.py")


def run(model_type: str, processes: int, batch_size: int, accumulation: int, folder: Path) -> dict[str, list[float]]:
    output = folder / f"{processes}-{batch_size}-{accumulation}.json"
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = [*(launch if processes > 1 else [sys.executable]), str(SCRIPT), model_type]
    subprocess.run(
        [*command, str(batch_size), str(accumulation), str(output)],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(output.read_text())


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_two_processes_agree_with_one(model_type, tmp_path):
    one = run(model_type, 1, 8, 1, tmp_path)
    assert one["predicted"] == 5
    for batch_size, accumulation in ((4, 1), (2, 2)):
        two = run(model_type, 2, batch_size, accumulation, tmp_path)
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert two["gradient_norms"] == pytest.approx(one["gradient_norms"], rel=1e-5)
        assert two["predicted"] == 5  # the row that fills up the last batch is not predicted twice


def test_the_fused_lora_pass_under_fsdp2():
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    result = subprocess.run(
        [*launch, str(SCRIPT.with_name("sharded_lora_script.py"))],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
