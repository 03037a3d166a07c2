"""Every race runs at a toy size, its sides agree, and a race whose sides do not is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from left_trainer import get_method
from places import REPOSITORY, SHARED
from processes import ENVIRONMENT

BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import limit  # noqa: E402
import race as racing  # noqa: E402
from race_report import write_records  # noqa: E402
from races import MEASURES, RACES, Race, Turn, tiny  # noqa: E402

# One of each family and of what is measured; each takes some twelve seconds, and the others take the same paths.
ONE_OF_EACH_KIND = ("mt5_small_lora", "llama_distillation", "generation")


def run(python: str, name: str, results: Path, *flags: str) -> tuple[subprocess.CompletedProcess, dict]:
    command = [python, str(BENCHMARKS / "race.py"), "--tiny", "--races", name, "--results", str(results)]
    result = subprocess.run(
        [*command, "--pairs", "1", *flags], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert results.exists(), result.stderr[-3000:]
    return result, json.loads(results.read_text())[0]


@pytest.mark.parametrize(
    "name", [name if name in ONE_OF_EACH_KIND else pytest.param(name, marks=pytest.mark.long) for name in RACES]
)
def test_a_race_runs_and_its_report_is_well_formed(name, python, tmp_path):
    race = RACES[name]
    if race.data == "tatoeba_en_fr" and not SHARED.exists():
        pytest.skip("real data are not here")
    result, record = run(python, name, tmp_path / "races.json", "--device", "cpu")
    assert result.returncode == 0, record.get("reason")
    assert (record["status"], record["name"], record["rival"]) == ("run", name, race.rival)
    assert record["speed"]["min"] <= record["speed"]["median"] <= record["speed"]["max"]
    assert record["versions"]["torch"]
    assert set(record["reached"]) <= {"speed", "memory"}
    assert bool(record["reached"]) == (race.target is not None)
    for side in record["sides"].values():
        assert len(side["seconds"]) == 1
        assert side["seconds"][0] > 0
        assert side["peak_bytes"] > side["weights_bytes"] > 0
        assert len(side["losses"]) == (tiny(race).steps if race.measure == "training_step" else 1)
        assert all(0 < loss < 20 for loss in side["losses"])
        assert bool(side["scores"]) == (race.measure == "generation")
    if race.measure == "training_step" and race.learning_rate != 0:
        assert len(set(record["sides"]["ours"]["losses"])) > 1
    assert f"| {name} | {race.rival} |" in result.stdout


def test_a_race_that_needs_a_gpu_is_not_run_without_one(python, tmp_path):
    result, record = run(python, "gpu_mt0_large_lora", tmp_path / "races.json")
    if record["status"] == "run":
        pytest.skip("a GPU is here")
    assert result.returncode == 0
    assert record["reason"] == "needs a GPU"
    assert "not run: needs a GPU" in result.stdout


def test_losses_at_the_output_head_agree(python):
    command = [python, str(BENCHMARKS / "loss_kernels.py"), "--device", "cpu", "--tiny", "--repeats", "1"]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=True)
    rows = re.findall(r"\| (\S[^|]*) \| [\d.]+ \| \d+ \| ([\d.]+) \|", result.stdout)
    assert {name for name, _ in rows} >= {"full logits", "left_trainer", "trl"}
    assert len({value for _, value in rows}) == 1


def test_losses_of_a_distillation_step_agree(python, tmp_path):
    names = ["mt5_small_from_base_jsd_float32", "llama_from_wider_bfloat16"]  # full logits, and TRL
    command = [python, str(BENCHMARKS / "distillation_step.py"), "--tiny", "--pairs", "1", "--races", *names]
    command += ["--results", str(tmp_path / "steps.json")]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    records = json.loads((tmp_path / "steps.json").read_text())
    assert [record["name"] for record in records] == names
    for record in records:
        assert record["differences"]["losses"] < 1e-2
        assert all(loss > 0 for side in record["sides"].values() for loss in side["losses"])
        assert set(record["reached"]) <= {"speed", "memory"}


def test_the_limit_of_a_race(python):
    command = [python, str(BENCHMARKS / "limit.py"), "bart_base_lora", "--tiny"]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=True)
    *_, head, _, row = result.stdout.splitlines()
    assert head.count("|") == row.count("|")
    assert re.fullmatch(r"\| bart_base_lora \|( \d+\.\d{3} s \|){3}( \d+\.\d\d \|){2}", row)


def test_the_limit_is_the_time_of_what_is_needed():
    assert (
        limit.row("a race", rival=3.0, ours=2.0, needed=1.5) == "| a race | 3.000 s | 2.000 s | 1.500 s | 1.50 | 2.00 |"
    )


def turn(**figures) -> Turn:
    return dataclasses.replace(Turn(seconds=1.0, losses=[2.0, 1.0], gradient_norms=[1.0, 1.0]), **figures)


@pytest.mark.parametrize(
    ("figures", "kind"),
    [
        ({"losses": [2.0, 1.0001]}, "losses"),
        ({"losses": [2.0, float("nan")]}, "losses"),
        ({"losses": [2.0]}, "losses"),
        ({"gradient_norms": [1.0, 1.001]}, "gradient_norms"),
        ({"scores": {"chrf": 50.0}}, "scores"),
    ],
)
def test_sides_that_disagree_are_refused(figures, kind):
    race = Race("a race", "lora")
    assert racing.compare(race, [turn()], [turn()]) == {"losses": 0.0, "scores": 0.0, "gradient_norms": 0.0}
    with pytest.raises(racing.RaceRefusedError, match=kind):
        racing.compare(race, [turn(), turn()], [turn(), turn(**figures)])


def test_bfloat16_rounds_more_than_float32():
    ours = turn(losses=[2.0, 1.001])
    racing.compare(Race("a race", "lora", dtype="bfloat16"), [turn()], [ours])
    with pytest.raises(racing.RaceRefusedError):
        racing.compare(Race("a race", "lora"), [turn()], [ours])


def test_the_warm_up_has_the_memory_and_not_the_speed():
    race = RACES["mt5_small_lora"]
    rival = [turn(seconds=99.0, weights_bytes=100, peak_bytes=300), turn(seconds=4.0), turn(seconds=6.0)]
    ours = [turn(seconds=1.0, weights_bytes=100, peak_bytes=200), turn(seconds=2.0), turn(seconds=2.0)]
    record = racing.summarize(race, rival, ours)
    assert record["speed"] == {"median": 2.5, "min": 2.0, "max": 3.0}
    assert record["memory"] == 0.5
    assert record["reached"] == {"speed": True, "memory": True}


def test_races_name_what_exists():
    for name, race in RACES.items():
        assert race.name == name
        assert race.measure in MEASURES
        assert get_method(race.method).name == race.method
        assert (race.shape is None) == (race.data is not None)


def test_each_machine_has_its_record_of_a_race(tmp_path):
    def record(name, machine, status="run", number=0):
        return {"name": name, "machine": machine, "status": status, "number": number}

    file = tmp_path / "races.json"
    write_records([record("a", "one"), record("gpu", "one", "not run")], file)
    write_records([record("a", "two"), record("gpu", "two", "not run")], file)
    write_records([record("a", "one", number=1), record("gpu", "three")], file)
    found = [(each["name"], each["machine"], each["number"]) for each in json.loads(file.read_text())]
    assert found == [("a", "one", 1), ("a", "two", 0), ("gpu", "three", 0)]


def test_seconds_to_the_first_step(python, tmp_path):
    command = [python, str(BENCHMARKS / "start.py"), "--pairs", "1", "--rows", "40", "--families", "decoder_only"]
    command += ["--results", str(tmp_path / "start.json")]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    families = json.loads((tmp_path / "start.json").read_text())["families"]
    record = families["decoder_only"]
    ours = record["seconds"]["left-trainer train to the first step"]
    plain = record["seconds"]["plain stack to the first step"]
    assert record["more"] == [pytest.approx(ours[0] - plain[0])]
    assert record["seconds"]["scoring before it"][0] > 0
