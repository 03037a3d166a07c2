"""Whatever one process ends with, two end with: batches that are filled up, streams, starts, machines, the report."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import many_processes as script
from method_settings import CASES
from processes import ENVIRONMENT

EQUAL = ("evaluations", "trainings", "methods", "machines")
ALONE = ("refusals", "report")  # asked of several processes
OTHERS = [case for case in CASES if case not in script.HOOKED]
# A start from singular vectors, and what draws numbers in every pass.
TOLERANCE = {"lora_ga": 1e-4}
RANDOM = ("poly", "pvera")


def in_two_processes(python: str, folder: Path, parts: tuple[str, ...], cases: list[tuple[str, str]]) -> dict[str, Any]:
    folder.mkdir()
    output = folder / "results.json"
    launch = [python, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*launch, script.__file__, str(output), json.dumps(parts), json.dumps(cases)]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def two(python, tmp_path_factory) -> dict[str, Any]:
    return in_two_processes(python, tmp_path_factory.mktemp("many") / "two", (*EQUAL, *ALONE), script.HOOKED)


def check_equal(two: dict[str, Any], one: dict[str, Any]) -> None:
    assert two.keys() == one.keys()
    for name, expected in one.items():
        method = name.partition(",")[0]
        if method not in RANDOM:
            flat, other = list(flattened(two[name])), list(flattened(expected))
            assert flat == pytest.approx(other, rel=TOLERANCE.get(method, 2e-5), abs=1e-7), name


def flattened(values: Any) -> Any:
    for value in values if isinstance(values, list) else [values]:
        yield from flattened(value) if isinstance(value, list) else [value]


@pytest.mark.parametrize("part", ["evaluations", "trainings"])
def test_rows_that_fill_up_a_batch_do_not_count(two, tmp_path, part):
    check_equal(two[part], script.results(tmp_path, 1, [part], [])[part])


def test_methods_with_hooks_start_from_all_rows_and_train_as_one(two, tmp_path):
    """Data-driven starts, losses, penalties, optimizers and what acts during training."""
    check_equal(two["methods"], script.results(tmp_path, 1, ["methods"], script.HOOKED)["methods"])


@pytest.mark.long
def test_methods_without_hooks_train_as_one(python, tmp_path):
    two = in_two_processes(python, tmp_path / "two", ("methods",), OTHERS)
    check_equal(two["methods"], script.results(tmp_path, 1, ["methods"], OTHERS)["methods"])


def test_machines_without_a_common_disk_load_what_the_first_has(two, tmp_path):
    one = script.results(tmp_path, 1, ["machines"], [])["machines"]
    for model_type in script.TYPES:
        message = two["machines"].pop(f"{model_type}, other rows")
        assert "x processes was 8 and is 16" in message
        assert not one.pop(f"{model_type}, other rows")  # as many as in each step of one process
    check_equal(two["machines"], one)


def test_what_processes_cannot_share_is_refused(two):
    refused = two["refusals"]
    assert "device_map=" in refused["device_map"]
    assert "spreads the model over cpu, disk" in refused["device_map"]
    assert "dispatch_batches=True" in refused["dispatch_batches"]


def test_the_report_is_of_all_processes(two):
    report = two["report"]
    first, second = report["figures"]
    assert report["processes"] == 2
    steps, rows, generated = report["rates"]
    assert steps == pytest.approx(1 / max(first["seconds_per_step"], second["seconds_per_step"]))
    assert rows == pytest.approx(steps * script.STEP)
    assert generated == pytest.approx(first["generated_rows_per_second"] + second["generated_rows_per_second"])
    peaks = [each["train_peak_bytes"] for each in (first, second)]
    assert all(peaks)
    assert report["memory"]["train"] == max(peaks)
    assert report["memory"]["train_of_all"] == sum(peaks)
    assert report["memory"]["eval"] == max(each["eval_peak_bytes"] for each in (first, second))
