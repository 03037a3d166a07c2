"""Plans against the bytes of tensors that the same training allocates on the CPU, for every method and family."""

from __future__ import annotations

import gc
import itertools
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from left_trainer import LeftTrainer, LeftTrainingArguments, TrainingPlan, list_methods, plan_training
from left_trainer.models import auto_class
from left_trainer.planning.rehearsal import BatchShape
from left_trainer.recording.recorder import StepRecorder
from left_trainer.recording.timeline import peak
from method_settings import CASES, BaseModels, model_argument, settings
from tiny import VOCABULARY_SIZE, tiny_tokenizer

SHAPE = BatchShape(rows=4, source=24, target=8)
WORST, MEDIAN = 0.05, 0.02
# Further off, and the causes are not established. EVA spreads its ranks over the layers by the data, which a plan has
# not; SHiRA and WaveFT compute on sparse and padded weights, whose kernels may take less than a plan counts.
LARGER = {"eva": 0.10, "shira": 0.07, "waveft": 0.13}
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 4},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "full logits": {"use_linear_cross_entropy": False},
    "foreach": {"optim": "adamw_torch"},
    "adafactor": {"optim": "adafactor"},
}
errors: dict[Any, float] = {}


class StepCallback(TrainerCallback):
    """Tells a recorder when the first step begins: what an initialisation takes is not of the step."""

    def __init__(self, recorder: StepRecorder) -> None:
        self.recorder = recorder

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.recorder.phase = "forward"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return BaseModels(tmp_path_factory.mktemp("bases"))


def rows_of(shape: BatchShape, family: str) -> Dataset:
    """The rows that a batch of that shape is collated from."""
    features = shape.features(family == "encoder_decoder", VOCABULARY_SIZE)
    rows = []
    for ids, mask, labels in zip(*(features[name] for name in ("input_ids", "attention_mask", "labels")), strict=True):
        kept = mask.bool()
        targets = labels[kept] if family == "decoder_only" else labels[labels.ne(-100)]
        rows.append(
            {"input_ids": ids[kept].tolist(), "attention_mask": [1] * int(kept.sum()), "labels": targets.tolist()}
        )
    return Dataset.from_list(rows)


def arguments(method: str, family: str, folder: Path, **options: Any) -> LeftTrainingArguments:
    given: dict[str, Any] = {
        "output_dir": str(folder / "output"),
        "peft_method": method,
        "max_steps": 5 if method == "adalora" else 2,
        "per_device_train_batch_size": SHAPE.rows,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        **settings(method, family, folder),
        **options,
    }
    return LeftTrainingArguments(**given)


def planned(args: LeftTrainingArguments, path: Path) -> TrainingPlan:
    return plan_training(str(path), args, source_tokens=SHAPE.source, target_tokens=SHAPE.target, device="cpu")


def trainer_of(args: LeftTrainingArguments, path: Path, family: str) -> LeftTrainer:
    rows = list(rows_of(SHAPE, family)) * args.gradient_accumulation_steps
    return LeftTrainer(
        model_argument(args.peft_method, path, auto_class(family).from_pretrained),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(family),
    )


def measured_bytes(trainer: LeftTrainer) -> int:
    """The most bytes of tensors in the steps of a training."""
    gc.collect()
    recorder = StepRecorder("cpu")
    recorder.label_model(trainer.model)
    trainer.add_callback(StepCallback(recorder))
    with recorder:
        trainer.train()
    return peak(recorder.recording, is_steady=False).n_bytes


# Every other method on each family; the rest takes as long again.
QUICK = {
    (method.name, method.model_families[index % len(method.model_families)])
    for index, method in enumerate(list_methods())
}


@pytest.mark.parametrize(
    ("method", "family"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.long) for case in CASES],
)
def test_a_plan_has_the_bytes_of_the_training(method, family, bases, tmp_path):
    args = arguments(method, family, tmp_path)
    error = planned(args, bases[method, family]).peak_bytes / measured_bytes(
        trainer_of(args, bases[method, family], family)
    )
    errors[method, family] = error - 1
    assert abs(error - 1) <= LARGER.get(method, WORST)


# Each argument with one of the first two pairs in turn; the rest takes four times as long.
PAIRS = list(itertools.product(("lora", "full"), ("encoder_decoder", "decoder_only")))
PAIRS.sort(key=lambda pair: pair not in (("lora", "encoder_decoder"), ("full", "decoder_only")))


@pytest.mark.parametrize(
    ("option", "method", "family"),
    [
        pytest.param(option, *pair, marks=() if pair == PAIRS[index % 2] else pytest.mark.long)
        for index, option in enumerate(PRECISIONS)
        for pair in PAIRS
    ],
)
def test_arguments_change_a_plan_as_they_change_the_training(option, method, family, bases, tmp_path):
    args = arguments(method, family, tmp_path, **PRECISIONS[option])
    plan = planned(args, bases[method, family])
    assert plan.peak_bytes == pytest.approx(measured_bytes(trainer_of(args, bases[method, family], family)), rel=WORST)


def test_most_plans_are_exact():
    if len(errors) < len(CASES) // 4:
        pytest.skip("the cases ran in other processes")
    assert statistics.median(map(abs, errors.values())) <= MEDIAN


def test_the_recorder_counts_what_torchs_profiler_counts():
    """Step by step: the largest sum of the allocations that the profiler lists is the peak."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    recorder, data = StepRecorder("cpu"), torch.ones(32, 64)

    def step() -> None:
        layers(data).square().sum().backward()
        layers.zero_grad()

    step()
    recorder.label_model(layers)
    weights = recorder.live_bytes
    recorder.begin("forward")
    with recorder:
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    total, most = 0, 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    assert peak(recorder.recording).n_bytes - weights == most > 0
