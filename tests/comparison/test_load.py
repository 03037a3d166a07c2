"""A comparison of 500 runs is summed up in seconds, and its page is small until samples are opened."""

from __future__ import annotations

import time

from left_trainer import list_methods, list_tasks
from left_trainer.comparison.cell import Cell
from left_trainer.comparison.output import write_outputs
from left_trainer.comparison.results import Result, read_results
from left_trainer.runs.report import Metrics, PeakMemory, Sample, TrainingReport

CONDITIONS = {"base_model": "m", "prompt": "{source}", "data_sha256": "0", "max_new_tokens": 64, "num_beams": 1}
TEXT = "The council decided on Tuesday to build a new bridge across the river, which costs nine million. " * 20
N_RUNS = 500


def report(task: str, metric: str, method: str, seed: int) -> TrainingReport:
    score = len(method) + seed / 100
    samples = tuple(Sample(f"{i} {TEXT}", TEXT[:200], prediction=f"{method} {TEXT[:180]}") for i in range(8))
    return TrainingReport(
        method=method, peft_kwargs={"r": 8}, task=task, prompt="{source}", base_model="m", trainable_parameters=1000,
        total_parameters=10**6, trainable_percent=0.1, matched_modules=(),
        metrics=Metrics({metric: 1.0}, {metric: score}),
        learning_rate=1e-3, learning_rate_source="default", train_steps=1000, train_batch_size=16,
        train_steps_per_second=3.0, train_samples_per_second=48.0, train_target_tokens_per_second=1e3,
        generation_samples_per_second=10.0, peak_memory_bytes=PeakMemory(10**8, 10**7), fast_paths={},
        adapter_size_bytes=10**5, loss_history=tuple((10 * i, 3 / (i + 1) + 0.123456789) for i in range(100)),
        samples=samples, seed=seed, versions={}, device="cpu", machine="box", run_seconds=10.0,
    )  # fmt: skip


def results() -> list[Result]:
    made = [
        Result(
            Cell("method", task.name, {"seed": seed, "peft_method": method.name}, CONDITIONS),
            report(task.name, task.main_metric, method.name, seed),
        )
        for seed in (42, 43)
        for task in list_tasks()
        for method in list_methods()
    ]
    return made[:N_RUNS]


def test_five_hundred_runs(tmp_path):
    made = results()
    assert len(made) == N_RUNS
    began = time.process_time()
    write_outputs(made, tmp_path)
    assert len(read_results(tmp_path)) == N_RUNS
    assert time.process_time() - began < 8  # 4.5 on one core of 2023
    assert (tmp_path / "index.html").stat().st_size < 2**20
    assert len(list((tmp_path / "samples").iterdir())) == len({(run.cell.task, run.cell.method) for run in made})
