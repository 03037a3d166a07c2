"""Two processes share what a teacher writes and keeps, and the tokens that their students write."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import taught_processes as script
from processes import ENVIRONMENT


def test_two_processes_agree_with_one(python, monkeypatch, tmp_path):
    monkeypatch.setattr(script.on_policy, "SAMPLING", script.GREEDY)
    one = script.results(tmp_path / "one", 1)
    output = tmp_path / "two" / "results.json"
    output.parent.mkdir()
    launch = [python, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    subprocess.run([*launch, script.__file__, str(output), "2"], check=True, capture_output=True, env=ENVIRONMENT)
    two = json.loads(output.read_text())
    assert two.keys() == one.keys()
    for name in one:
        for mine, other in zip(two[name], one[name], strict=True):
            assert mine == pytest.approx(other, rel=1e-5), name
    (targets,) = (tmp_path / "two" / "encoder_decoder").glob("teacher_targets-*")
    (expected,) = (tmp_path / "one" / "encoder_decoder").glob("teacher_targets-*")
    assert targets.read_bytes() == expected.read_bytes()
    parts = sorted(path.name for path in (tmp_path / "two" / "encoder_decoder").glob("teacher_cache-*/part-*"))
    assert [Path(part).name[:10] for part in parts] == ["part-00000", "part-00001"]
