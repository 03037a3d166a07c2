"""Runs of one or more processes, with what they end with; started by tests/parity/test_many_processes.py."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset

from left_trainer import (
    LeftTrainer,
    LeftTrainingArguments,
    MemoryProfilerCallback,
    StepTimerCallback,
    build_report,
    get_method,
    get_task,
)
from left_trainer.models import auto_class, model_family, unwrapped
from log_history import gradient_norms, losses
from method_settings import CASES, BaseModels, model_argument, settings
from tiny import tiny_model, tiny_rows, tiny_tokenizer

STEP = 8  # rows of all processes
UNEVEN = 12  # rows of a step and a half
EVALUATED = 7
TYPES = ("t5", "llama")
PACKED = {"packing": True, "max_length": 32}  # of decoder-only models
EVALUATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch larger than the rows": {"per_device_eval_batch_size": 8},
    "loss alone": {"prediction_loss_only": True},
    "accumulated": {"eval_accumulation_steps": 1},
    "smoothed": {"label_smoothing_factor": 0.1},
    "full logits": {"use_linear_cross_entropy": False},
    "generated": {"predict_with_generate": True},
    "generated in order": {"predict_with_generate": True, "sort_eval_by_length": False},
    "streamed": {"streamed": True},
    "streamed and generated": {"streamed": True, "predict_with_generate": True},
    "packed": PACKED,
}
TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "after an evaluation": {"evaluated": True},
    "after an evaluation, in bf16": {"evaluated": True, "bf16": True},
    "accumulated": {"gradient_accumulation_steps": 2},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "smoothed": {"label_smoothing_factor": 0.1},
    "full logits": {"use_linear_cross_entropy": False},
    "smoothed full logits": {"use_linear_cross_entropy": False, "label_smoothing_factor": 0.1},
    "streamed": {"files": 1},
    "streamed from files": {"files": 3},
    "packed": PACKED,
}
# What only wraps a model trains in several processes as any other module does.
HOOKED = [case for case in CASES if not get_method(case[0]).only_wraps]


def trainer(folder: Path, model: Any, rows: Any, processes: int, **overrides: Any) -> LeftTrainer:
    """A trainer of two steps of `STEP` rows."""
    accumulation = overrides.get("gradient_accumulation_steps", 1)
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "peft_method": "full",
        "per_device_train_batch_size": STEP // processes // accumulation,
        "per_device_eval_batch_size": 2,
        "generation_max_length": 4,
        "max_steps": 2,
        "max_grad_norm": 1e9,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 5,
        **overrides,
    }
    callbacks, family = options.pop("callbacks", ()), options.pop("family", None) or model_family(model)
    evaluated = options.pop("evaluated", None)
    return LeftTrainer(
        model,
        LeftTrainingArguments(**options),
        train_dataset=rows,
        eval_dataset=evaluated,
        processing_class=tiny_tokenizer(family),
        callbacks=callbacks,
    )


def shards(rows: list[dict[str, str]], files: int) -> IterableDataset:
    """A stream of `rows` that is read from several files, which are not equally long."""

    def read(numbers: list[int]) -> Iterator[dict[str, str]]:
        for number in numbers:
            yield from rows[number * 5 : (number + 1) * 5 if number < files - 1 else None]

    return IterableDataset.from_generator(read, gen_kwargs={"numbers": list(range(files))})


def of_type(given: dict[str, dict[str, Any]], model_type: str) -> list[tuple[str, dict[str, Any]]]:
    """Those of a kind of model."""
    return [case for case in given.items() if model_type == "llama" or case[1] is not PACKED]


def evaluations(folder: Path, processes: int) -> Iterator[tuple[str, Any]]:
    """Losses and scores of rows that fill no batch."""
    for model_type in TYPES:
        for name, given in of_type(EVALUATIONS, model_type):
            options = dict(given)
            rows: Any = Dataset.from_list(tiny_rows(EVALUATED))
            rows = rows.to_iterable_dataset() if options.pop("streamed", False) else rows
            made = trainer(folder, tiny_model(model_type), Dataset.from_list(tiny_rows(4)), processes, **options)
            found = made.evaluate(rows)
            yield f"{model_type}, {name}", [found[key] for key in ("eval_loss", "eval_chrf") if key in found]


def trainings(folder: Path, processes: int) -> Iterator[tuple[str, Any]]:
    """Losses and gradient norms of a step of whole batches and one of batches that are filled up."""
    for model_type in (*TYPES, "bart"):
        for name, given in of_type(TRAININGS, model_type):
            options = {"train_sampling_strategy": "sequential", **given}
            rows, files = tiny_rows(UNEVEN), options.pop("files", 0)
            evaluates = options.pop("evaluated", False)
            source = shards(rows, files) if files else Dataset.from_list(rows)
            made = trainer(folder, tiny_model(model_type), source, processes, **options)
            if evaluates:
                made.evaluate(Dataset.from_list(tiny_rows(EVALUATED)))
            made.train()
            if not made.args.bf16:  # which rounds rows of other batches otherwise
                yield f"{model_type}, {name}", [losses(made), gradient_norms(made)]
            yield f"{model_type}, {name}, weights", 1.0 * is_same_everywhere(made)


def methods(folder: Path, processes: int, cases: list[tuple[str, str]]) -> Iterator[tuple[str, Any]]:
    """Losses and gradient norms, and whether all processes have the same weights."""
    bases = BaseModels(folder.parent)
    for method, family in cases:
        with PartialState().main_process_first():
            saved = bases[method, family]
            options = settings(method, family, folder.parent)
        model = model_argument(method, saved, auto_class(family).from_pretrained)
        rows = Dataset.from_list(tiny_rows(UNEVEN))
        made = trainer(folder, model, rows, processes, peft_method=method, family=family, **options)
        made.train()
        yield f"{method}, {family}", [losses(made), gradient_norms(made), 1.0 * is_same_everywhere(made)]


def is_same_everywhere(made: LeftTrainer) -> bool:
    """Whether every process has the same weights, trained or not."""
    sums = [[weight.double().abs().sum().item() for weight in unwrapped(made.model).parameters()]]
    return all(each == sums[0] for each in gather_object(sums))


def machines(folder: Path, processes: int) -> Iterator[tuple[str, Any]]:
    """The best model, and a run that goes on, where each process has a folder of its own and one loses it."""
    own = folder / f"machine-{PartialState().process_index}"
    evaluated = Dataset.from_list(tiny_rows(5))
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.2}
    for model_type, method in (("t5", "lora"), ("llama", "p_tuning")):

        def make(model_type: str = model_type, method: str = method, **overrides: Any) -> LeftTrainer:
            rows = Dataset.from_list(tiny_rows(20))
            options = {**saving, **best, "peft_method": method, "evaluated": evaluated, **overrides}
            return trainer(own / model_type, tiny_model(model_type), rows, processes, **options)

        made = make()
        made.train()
        ended = [losses(made), made.state.best_global_step, made.evaluate()["eval_loss"]]
        yield f"{model_type}, best", [*ended, 1.0 * is_same_everywhere(made)]
        yield f"{model_type}, left over", sorted(path.name for path in own.rglob(".*"))
        if PartialState().is_main_process:
            shutil.rmtree(own / model_type / "checkpoint-3")
        else:
            shutil.rmtree(own)
        gone_on = make()
        gone_on.train(resume_from_checkpoint=True)
        ended = [losses(gone_on), gone_on.state.best_global_step, gone_on.evaluate()["eval_loss"]]
        yield f"{model_type}, resumed", [*ended, 1.0 * is_same_everywhere(gone_on)]
        with_other_rows = make(per_device_train_batch_size=STEP)
        yield f"{model_type}, other rows", refusal(lambda made=with_other_rows: made.train(resume_from_checkpoint=True))


def refusal(run: Callable[[], Any]) -> str:
    """What `run` raises in every process."""
    try:
        run()
    except ValueError as error:
        found = gather_object([str(error)])
        return found[0] if len(set(found)) == 1 else str(found)
    return ""


def refusals(folder: Path, processes: int) -> Iterator[tuple[str, Any]]:
    """What several processes are refused, before weights are loaded."""
    with PartialState().main_process_first():
        saved = BaseModels(folder.parent)["lora", "encoder_decoder"]
    spread = {"device_map": {"shared": "cpu", "encoder": "cpu", "decoder": "disk", "lm_head": "cpu"}}
    for name, options in {
        "device_map": {"model_init_kwargs": spread},
        "dispatch_batches": {"accelerator_config": {"dispatch_batches": True}},
    }.items():
        options = {**options, "family": "encoder_decoder"}
        yield name, refusal(lambda options=options: trainer(folder, str(saved), None, processes, **options))


def report(folder: Path, processes: int) -> Iterator[tuple[str, Any]]:
    """What the report says of all processes."""
    rows = Dataset.from_list(tiny_rows(UNEVEN))
    callbacks = [MemoryProfilerCallback(plot=False, print_table=False), StepTimerCallback()]
    made = trainer(folder, tiny_model("t5"), rows, processes, callbacks=callbacks, predict_with_generate=True)
    made.train()
    predicted = made.predict(rows)
    found = build_report(made, get_task("summarization"), None, predicted.metrics)
    yield "processes", found.processes
    yield "figures", [vars(each) for each in made.figures]
    yield "rates", [found.train_steps_per_second, found.train_samples_per_second, found.generation_samples_per_second]
    yield "memory", vars(found.peak_memory_bytes)


PARTS: dict[str, Callable[..., Iterator[tuple[str, Any]]]] = {
    "evaluations": evaluations,
    "trainings": trainings,
    "methods": methods,
    "machines": machines,
    "refusals": refusals,
    "report": report,
}


def results(folder: Path, processes: int, parts: list[str], cases: list[tuple[str, str]]) -> dict[str, Any]:
    """By part and name."""
    found = {}
    for part in parts:
        rest = (cases,) if part == "methods" else ()
        found[part] = dict(PARTS[part](folder / part, processes, *rest))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    output, parts, cases = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    LeftTrainingArguments(output_dir=str(output.parent), report_to="none")  # connects the processes
    found = results(output.parent, int(os.environ["WORLD_SIZE"]), parts, cases)
    if PartialState().is_main_process:
        output.write_text(json.dumps(found))
