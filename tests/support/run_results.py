"""Results of a comparison that nobody has run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from left_trainer.comparison.cell import Cell
from left_trainer.comparison.results import Result
from left_trainer.runs.report import Metrics, PeakMemory, Sample, TrainingReport

MIB = 1024**2
CONDITIONS = {"base_model": "m", "data_sha256": "d", "prompt": "{source}", "max_new_tokens": 8, "num_beams": 1}
VERSIONS = dict.fromkeys(("python", "torch", "transformers", "peft", "trl"), "1.0")


def make_result(
    method: str = "lora", seed: int = 42, rouge: float = 50.0, cell: dict[str, Any] | None = None, **changes: Any
) -> Result:
    """A finished run, or the base model's; `cell` replaces fields of the cell and `changes` those of the report."""
    is_base = method == "base"
    arguments = {"peft_method": "full" if is_base else method, "seed": seed}
    scores = {"rougeL": rouge, "loss": 1.0, "generated_length": 5.0, "runtime": 1.0}
    report = TrainingReport(
        method=method,
        peft_kwargs={},
        task="summarization",
        prompt="{source}",
        base_model="m",
        trainable_parameters=None if is_base else 10,
        total_parameters=1000,
        trainable_percent=None if is_base else 1.0,
        matched_modules=(),
        metrics=Metrics(scores if is_base else None, None if is_base else scores),
        learning_rate=1e-3,
        learning_rate_source="default",
        train_steps=0 if is_base else 20,
        train_batch_size=16,
        train_steps_per_second=4.0,
        train_samples_per_second=64.0,
        train_target_tokens_per_second=400.0,
        generation_samples_per_second=30.0,
        peak_memory_bytes=PeakMemory(500 * MIB, 450 * MIB),
        fast_paths={},
        adapter_size_bytes=2048,
        loss_history=((10, 2.0), (20, 1.0)),
        samples=(Sample("s", "r", prediction=method),),
        seed=seed,
        versions=VERSIONS,
        device="cpu",
        machine="a machine",
        memory_before_model_bytes=400 * MIB,
        general_loss=2.0 if is_base else 2.5,
    )
    plain = Cell("base" if is_base else "method", "summarization", arguments, CONDITIONS)
    return Result(replace(plain, **(cell or {})), replace(report, **changes))


# A name with what Markdown, LaTeX, HTML and file systems take for something else.
ODD = "a/b | <i>$_%\\`学"


def named(name: str, rouge: float, after: str | None = None, model: str = "m", **changes: Any) -> Result:
    """A finished run of a named setting, which may refer to the result of another."""
    cell = {"setting": name, "after": {after: f"cell-of-{after}"} if after else None}
    return make_result("full", rouge=rouge, cell={**cell, "conditions": {**CONDITIONS, "base_model": model}}, **changes)


def sized() -> list[Result]:
    """A teacher and students of several sizes and speeds, one of them with an odd name, on two models."""
    rows = [
        ("teacher", 60.0, 1000, 10.0),
        ("half", 55.0, 500, 20.0),
        (ODD, 30.0, 250, 30.0),
        ("beaten", 20.0, 500, 15.0),
    ]
    results = [
        named(name, rouge, None if name == "teacher" else "teacher", base_parameters=size, model_size_bytes=4 * size,
              generation_samples_per_second=speed)
        for name, rouge, size, speed in rows
    ]  # fmt: skip
    own = named("own", 35.0, "teacher", model="n", base_parameters=300, generation_samples_per_second=25.0)
    base = make_result("base", rouge=5.0, base_parameters=1000)
    other = make_result("base", rouge=7.0, base_parameters=300, cell={"conditions": {**CONDITIONS, "base_model": "n"}})
    return [base, other, *results, own]
