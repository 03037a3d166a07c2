"""Comparisons that several processes share, on one machine or through an engine: the table is that of one process."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from compared import finished, quality
from left_trainer.cli.main import main
from left_trainer.comparison.attempt import Attempt
from left_trainer.comparison.cell import FAILURE_FILE
from left_trainer.comparison.claims import OWNER_FILE, claims, n_lost
from left_trainer.comparison.engines import make_engine
from left_trainer.comparison.engines.local_engine import environment_of
from left_trainer.comparison.engines.slurm_engine import SlurmEngine
from left_trainer.comparison.plan_file import PlanFile
from left_trainer.comparison.results import Result
from left_trainer.comparison.worker import Terms, Worker
from left_trainer.runs.json_records import write_json
from left_trainer.runs.report import FastPathUse
from left_trainer.storage import owners
from processes import ENVIRONMENT, kill
from run_results import make_result
from tiny import tiny_rows

STUDENT = {"name": "student", "peft_method": "full", "teacher_model": "{teacher}", "distillation_kwargs": "alpha=0.5"}
METHODS = [STUDENT, {"name": "teacher", "peft_method": "full"}, {"peft_method": "prefix_tuning", "max_length": 4}]


@pytest.fixture(scope="module")
def config(saved_models, tmp_path_factory) -> Path:
    """A comparison of a teacher, its student and a run that fails."""
    folder = tmp_path_factory.mktemp("config")
    content = {
        "model_name_or_path": str(saved_models["encoder_decoder"]),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "generation_max_length": 6,
        "tasks": "summarization",
        "methods": METHODS,
    }
    for split, size in (("train", 12), ("test", 4)):
        rows = [{"document": row["prompt"], "summary": row["completion"].strip()} for row in tiny_rows(size, size)]
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        content[f"{split}_file"] = str(file)
    file = folder / "grid.yaml"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(scope="module")
def alone(config, python, tmp_path_factory) -> Path:
    """The folder of the comparison that one process ran."""
    folder = tmp_path_factory.mktemp("alone")
    command = [python, "-m", "left_trainer.cli.main", "compare", "--config", str(config), "--output_dir", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 1, result.stderr[-2000:]
    return folder


def plan(config: Path, output_dir: Path, *flags: str) -> None:
    assert main(["compare", "--plan", "--config", str(config), "--output_dir", str(output_dir), *flags]) == 0


def same_results(one: Path, other: Path) -> None:
    """The same table, and the same losses to the last digit."""
    assert quality(one) == quality(other)
    losses = [{name: report.loss_history for name, report in finished(folder).items()} for folder in (one, other)]
    assert losses[0] == losses[1]


def wait_for(pattern: str, folder: Path) -> None:
    while not list(folder.glob(pattern)):
        time.sleep(0.02)


def test_a_plan_has_every_cell_and_runs_nothing(config, tmp_path, capsys, no_weights):
    plan(config, tmp_path, "--seeds", "2")
    cells = list(tmp_path.glob("cells/*/cell.json"))
    assert len(cells) == 7
    assert {path.name for path in tmp_path.glob("cells/*/*")} == {"cell.json"}
    assert "7 runs are planned" in capsys.readouterr().out
    first = (tmp_path / "plan.json").read_text()
    grid = PlanFile.read(tmp_path).grid
    assert {cell.name for cell in grid.bases} <= {path.parent.name for path in cells}
    plan(config, tmp_path, "--seeds", "2")
    assert (tmp_path / "plan.json").read_text() == first


@pytest.mark.timeout(300)
def test_two_processes_after_one_that_was_killed(config, alone, python, tmp_path, capsys):
    """As if it had been on another machine: nobody can ask whether it still runs."""
    plan(config, tmp_path)
    command = [python, "-m", "left_trainer.cli.main", "compare", "--work", "--output_dir", str(tmp_path)]
    command += ["--takeover_seconds", "2"]
    options = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **options) as lost:
        wait_for("cells/*-teacher-*/claim-1/run/progress.txt", tmp_path)
        kill(lost)
    (claim,) = tmp_path.glob("cells/*-teacher-*/claim-1")
    owner = json.loads((claim / OWNER_FILE).read_text())
    (claim / OWNER_FILE).write_text(json.dumps({**owner, "host": "gone", "process": "00000000-1-1"}))
    # As `srun` and `torchrun` would start them.
    options["env"] = {**ENVIRONMENT, "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "WORLD_SIZE": "2", "RANK": "0"}
    with subprocess.Popen(command, **options) as one, subprocess.Popen(command, **options) as other:
        for worker in (one, other):
            worker.stdout.read()
            assert worker.wait() == 1  # one run fails
    same_results(alone, tmp_path)
    assert (claim.parent / "claim-2").is_dir()
    assert not list(tmp_path.glob("cells/*/claim-*/run"))


def test_a_comparison_is_read_while_it_runs(config, tmp_path, capsys):
    plan(config, tmp_path / "out")
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "out")])
    assert "no run is finished yet" in capsys.readouterr().err
    grid = PlanFile.read(tmp_path / "out").grid
    for cell, result in ((grid.bases[0], make_result("base")), (grid.plans[1].runs[0], make_result("full"))):
        result.report.write(tmp_path / "out" / "cells" / cell.name)
    assert main(["report", str(tmp_path / "out"), "--output_dir", str(tmp_path / "now")]) == 0
    shown = capsys.readouterr()
    assert "2 runs are not finished, and are not in the table" in shown.err
    assert [row["method"] for row in quality(tmp_path / "now")] == ["base", "teacher"]


def test_a_cell_that_takes_every_process_with_it_fails_and_is_tried_again_by_a_new_plan(config, tmp_path, monkeypatch):
    """Its student is left out."""
    plan(config, tmp_path)
    teacher = PlanFile.read(tmp_path).grid.plans[1].runs[0]
    gone = f"{owners.token().split('-')[0]}-999999999-1"  # of this machine

    def lose(attempt: Attempt) -> Future[None]:
        owner = attempt.claim.take(60)
        write_json(attempt.claim.folder / OWNER_FILE, replace(owner, process=gone))
        done = Future[None]()
        done.set_result(None)
        return done

    results: list[Result] = []
    engine = make_engine("local", 1, {}, tmp_path)
    monkeypatch.setattr(engine, "submit", lose)
    worker = Worker(tmp_path, PlanFile.read(tmp_path), engine, Terms(attempts=2), results.append)
    assert worker.run()
    failures = {result.cell.label: result.failure for result in results}
    assert failures["teacher"].startswith("The process that ran it was lost 2 times, the last one on ")
    assert failures["student"] == "Left out: it refers to the result of 'teacher', which has none."
    folder = tmp_path / "cells" / teacher.name
    assert n_lost(folder) == len(claims(folder)) == 2
    plan(config, tmp_path)
    assert n_lost(folder) == 0
    assert not (folder / FAILURE_FILE).exists()


@pytest.mark.timeout(300)
def test_a_launcher_starts_the_processes_of_each_run(config, python, monkeypatch, tmp_path, capsys):
    """Two processes of a run make one result, of batches that are twice as large."""
    launcher = f"{python} -m torch.distributed.run --standalone --nproc_per_node 2"
    flags = ["--methods", f"two=lora+launcher={launcher}", "--use_cpu", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "executable", python)
    assert main(["compare", "--config", str(config), *flags]) == 0
    base, two = sorted(finished(tmp_path).values(), key=lambda report: report.train_steps)
    assert (base.train_steps, two.train_steps, two.train_batch_size, two.setting) == (0, 2, 8, "two")
    (cell,) = tmp_path.glob("cells/*-two-*")
    assert json.loads((cell / "cell.json").read_text())["launcher"] == launcher
    assert len((cell / "predictions.jsonl").read_text().splitlines()) == two.test_rows == 4
    assert not list(cell.glob("*.safetensors"))


def test_gpus_are_shared_out_among_jobs_and_whole_where_there_is_a_launcher(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = [[environment_of(slot, jobs, launcher)["CUDA_VISIBLE_DEVICES"] for slot in range(jobs)]
            for jobs, launcher in ((1, False), (5, False), (1, True), (2, True), (4, True))]  # fmt: skip
    assert seen == [["0"], ["0", "1", "2", "3", "0"], ["0,1,2,3"], ["0,1", "2,3"], ["0", "1", "2", "3"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert environment_of(0, 1, True) == {"CUDA_VISIBLE_DEVICES": "5,7"}
    assert environment_of(1, 2, False)["CUDA_VISIBLE_DEVICES"] == "7"


@pytest.mark.timeout(300)
@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")
def test_jobs_of_slurm(config, alone, python, monkeypatch, tmp_path, capsys):
    """Through submitit's executor for one machine."""
    monkeypatch.setenv("SUBMITIT_LOG_LEVEL", "NOCONFIG")  # before it is imported, as the engine does
    from submitit.local.local import LocalExecutor

    start = property(lambda self: f"{python} -u -m submitit.core._submit {self.folder}")
    monkeypatch.setattr(LocalExecutor, "_submitit_command_str", start)  # a job starts at once
    monkeypatch.setattr(SlurmEngine, "tick_seconds", 0.1)
    flags = ["--engine", "slurm", "--engine_options", "cluster=local", "timeout_min=10", "--output_dir", str(tmp_path)]
    assert main(["compare", "--config", str(config), *flags]) == 1
    same_results(alone, tmp_path)
    assert len(list(tmp_path.glob("slurm/*_submitted.pkl"))) == 4
    for folder, expected in ((alone, (1, {})), (tmp_path, (0, {"the engine starts each run anew": 1}))):
        assert {name: report.fast_paths["forked_run"] for name, report in finished(folder).items()} == dict.fromkeys(
            finished(folder), FastPathUse(*expected)
        )


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_a_ray_cluster_that_loses_a_node(config, alone, monkeypatch, tmp_path, capsys):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    lost = []

    def lose_a_node() -> None:
        wait_for("cells/*-teacher-*/claim-1/run/progress.txt", tmp_path)
        (owner,) = tmp_path.glob(f"cells/*-teacher-*/claim-1/{OWNER_FILE}")
        pid = int(json.loads(owner.read_text())["process"].split("-")[1])
        parents = {parent.pid for parent in psutil.Process(pid).parents()}
        for node in nodes:
            if parents & {process.process.pid for process in node.all_processes["raylet"]}:
                lost.append(pid)
                cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=lose_a_node)
    thread.start()
    try:
        flags = ["--engine", "ray", "--engine_options", f"address={cluster.address}", "num_cpus=1"]
        flags += ["--output_dir", str(tmp_path), "--takeover_seconds", "30"]
        assert main(["compare", "--config", str(config), *flags]) == 1
    finally:
        thread.join()
        ray.shutdown()
        cluster.shutdown()
    assert lost
    assert list(tmp_path.glob("cells/*-teacher-*/claim-2"))
    same_results(alone, tmp_path)


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_an_engine_whose_package_is_missing_is_refused(name, package, monkeypatch, tmp_path, capsys, no_weights):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as exit_info:
        main(["compare", "--engine", name, "--output_dir", str(tmp_path / "out")])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert f"engine='{name}' needs the package {package}: pip install 'left_trainer[{name}]'." in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "rays"], "engine='rays' is not known. Did you mean 'ray'? Expected one of local, ray, slurm."),
        (
            ["--engine_options", "num_gpus=1"],
            "the local engine has the option fork alone. Others are those of a cluster",
        ),
        (["--engine_options", "fork=1"], "fork=1 must be true or false"),
        (["--engine", "slurm", "--engine_options", "gpus"], "engine_options has 'gpus'. Write KEY=VALUE"),
        (["--engine", "slurm", "--engine_options", "cluster=local", "gpus=1"], "gpus"),
        (["--plan", "--engine", "ray"], "--plan runs nothing and takes no --engine"),
        (["--plan", "--work"], "--plan runs nothing and --work plans nothing"),
        (["--work", "--methods", "lora"], "--work runs what --plan has written in --output_dir and takes no --methods"),
        (["--work", "--max_steps", "5"], "takes no --max_steps"),
        (["--work"], "has no plan.json. Plan the comparison first"),
        (["--config", "ENGINE"], "engine='rays' is not known."),
        (["--attempts", "0"], "attempts=0 must be an integer, at least 1"),
        (["--takeover_seconds", "0"], "takeover_seconds=0.0 must be a number, at least 1"),
        (["--launcher", "no-such-launcher --x"], "launcher='no-such-launcher --x' must be a command"),
        (["--methods", "a=lora+launcher='\"'"], "must be a command"),
        (["--seeds", "5-3"], "seeds='5-3' must be an integer, at least 1"),
        (["--seeds", "3,4"], "or FIRST-LAST for these, such as 45-47"),
        (
            ["--seeds", "45-46", "--tune", "learning_rate", "--methods", "t=full,s=full+teacher_model={t}"],
            "seeds='45-46' lacks seed 42",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_runs(flags, message, tmp_path, capsys, no_weights):
    (tmp_path / "engine.yaml").write_text("{engine: rays, engine_options: {num_gpus: 1}}")
    flags = [flag.replace("ENGINE", str(tmp_path / "engine.yaml")) for flag in flags]
    with pytest.raises(SystemExit) as exit_info:
        main(["compare", "--output_dir", str(tmp_path / "out"), *flags])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "cells").exists()
