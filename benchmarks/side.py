"""One side of a race: a trainer in a process of its own, which takes its turn when it is told to."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from peft import get_peft_model
from races import Lesson, Measure, Race, Shape, Turn
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar
from trl import SFTConfig, SFTTrainer

from left_trainer import LeftTrainer, LeftTrainingArguments, get_method, get_task, text_metrics
from left_trainer.callbacks.logging import CompactPrinterCallback
from left_trainer.callbacks.memory_counters import memory_counter
from left_trainer.callbacks.step_timer import StepTimerCallback, synchronize
from left_trainer.data.features import tokenize_pairs
from left_trainer.data.loading import embedded_data
from left_trainer.embedded import MODEL_PATHS
from left_trainer.methods.apply import build_config
from left_trainer.models import ModelFamily, auto_class, model_family
from left_trainer.models.positions import Limits

SEED = 0
WARMUP_STEPS = 1  # of each turn, beside the whole first turn
GENERATED_TOKENS = 64
EVALUATION_ROWS = 200  # behind the loss at the end of a training run
TEXT_TASKS = ("summarization", "translation", "dialogue")  # long, short and very uneven sources
SCORES = ("exact_match", "chrf")
TEXT_SCORES = (*SCORES, "generated_length", "mean_id")
FIRST_ORDINARY_TOKEN = 3  # below it are the special ones


@dataclass(frozen=True)
class Start:
    """What both sides start from."""

    race: Race
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    evaluation: Dataset
    teacher: PreTrainedModel | None = None

    @property
    def family(self) -> ModelFamily:
        """Of the model."""
        return model_family(self.model)


def run_side(connection: Connection, race: Race, side: str, device: str, shared: Path, folder: str) -> None:
    """Send a `Turn`, or the text of an error, whenever asked."""
    os.dup2(2, 1)  # standard output belongs to the table
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bar()
    disable_progress_bars()
    try:
        turns = take_turns(race, side, device, shared, folder)
        while connection.recv():
            connection.send(next(turns))
    except EOFError:
        return  # the race is over
    except Exception:
        connection.send(traceback.format_exc())


def take_turns(race: Race, side: str, device: str, shared: Path, folder: str) -> Iterator[Turn]:
    """Every turn is the same work from the same weights; the first says what memory it took."""
    start = load_start(race, device, shared)
    counter = memory_counter(torch.device(device))
    weights_bytes = counter.current()
    counter.reset_peak()
    trainer = SIDES[side](start, common_arguments(race, folder, device))
    for printer in (PrinterCallback, CompactPrinterCallback):
        trainer.remove_callback(printer)
    timer = StepTimerCallback()
    trainer.add_callback(timer)
    trained = {name: weight.detach().clone() for name, weight in trained_weights(trainer)}
    for number in itertools.count():
        reset(trainer, trained)
        turn = MEASURES[race.measure](trainer, timer)
        if number == 0:
            turn.weights_bytes, turn.peak_bytes = weights_bytes, counter.peak()
            counter.close()  # its sampling thread would take time from the turns that count
        torch.cuda.empty_cache()  # for the other side, which has the device next
        yield turn


def trained_weights(trainer: Trainer) -> list[tuple[str, torch.nn.Parameter]]:
    """Name and parameter of everything that is trained."""
    return [(name, weight) for name, weight in trainer.model.named_parameters() if weight.requires_grad]


def reset(trainer: Trainer, trained: Mapping[str, torch.Tensor]) -> None:
    """Bring a trainer back to where its first turn began."""
    with torch.no_grad():
        for name, weight in trained_weights(trainer):
            weight.copy_(trained[name])
    if trainer.optimizer is not None:
        trainer.optimizer.state.clear()
    set_seed(SEED)


# What both sides start from


def load_start(race: Race, device: str, shared: Path) -> Start:
    """The model on its device, and rows for it."""
    if race.shape is None:
        path = MODEL_PATHS["encoder_decoder"]
        model = AutoModelForSeq2SeqLM.from_pretrained(path).to(device)
        return Start(race, model, AutoTokenizer.from_pretrained(path), *text_rows(race, shared))
    model = random_model(race.shape, getattr(torch, race.dtype), device)
    rows = random_rows(race, model)
    teacher = None
    if race.lesson:
        teacher = random_model(race.lesson.teacher, model.dtype, device, SEED + 1).requires_grad_(False).eval()
    return Start(race, model, pad_and_end_tokenizer(model), rows, rows, teacher)


def random_model(shape: Shape, dtype: torch.dtype, device: str, seed: int = SEED) -> PreTrainedModel:
    """A model with random weights, the same ones for every caller."""
    config = AutoConfig.for_model(shape.model_type, **shape.config)
    set_seed(seed)
    with torch.device(device):
        model = auto_class(model_family(config)).from_config(config, dtype=dtype)
    if shape.has_own_head:
        # A deviation that gives logits of a deviation near 1, and a loss as a trained model's, not one of hundreds.
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight).normal_(std=head.in_features**-0.5))
    return model


def random_rows(race: Race, model: PreTrainedModel) -> Dataset:
    """Rows of random token ids for one turn, all of the race's length."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (race.steps * race.batch_size, race.source_length + race.target_length)
    ids = torch.randint(FIRST_ORDINARY_TOKEN, model.config.vocab_size, shape, generator=generator)
    ids[:, : race.prefix_length] = ids[0, : race.prefix_length]
    source, target = ids.split([race.source_length, race.target_length], dim=1)
    if model_family(model) == "encoder_decoder":
        return Dataset.from_dict({"input_ids": source.tolist(), "labels": target.tolist()})
    labels = torch.cat([torch.full_like(source, -100), target], dim=1)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def pad_and_end_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerFast:
    """All that trainers need of a tokenizer where the rows are token ids already."""
    vocabulary = {"<pad>": model.config.pad_token_id, "</s>": model.config.eos_token_id}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def text_rows(race: Race, shared: Path) -> tuple[Dataset, Dataset]:
    """Prompts and completions to train on and to evaluate with, in an order that mixes their lengths."""
    number = race.steps * race.batch_size
    if race.data == "embedded":
        tasks = [get_task(name) for name in TEXT_TASKS]
        parts = [
            prompt_rows(embedded_data(task)["validation"].to_list(), task.source_column, task.target_column)
            for task in tasks
        ]
        rows = concatenate_datasets(parts).shuffle(seed=SEED)
        rows = rows.select(range(number))
        return rows, rows
    splits = []
    for split, size in (("train", number), ("validation", EVALUATION_ROWS)):
        lines = (shared / "data" / str(race.data) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        splits.append(prompt_rows([json.loads(line) for line in lines[:size]], "source", "target"))
    return splits[0], splits[1]


def prompt_rows(rows: list[dict[str, Any]], source: str, target: str) -> Dataset:
    """Rows as prompt and completion."""
    return Dataset.from_list([{"prompt": row[source], "completion": row[target]} for row in rows])


# The sides


def common_arguments(race: Race, folder: str, device: str) -> dict[str, Any]:
    """The training arguments of both sides, with everything named in which their defaults differ."""
    learning_rate = get_method(race.method).learning_rate if race.learning_rate is None else race.learning_rate
    return {
        "output_dir": folder,
        "max_steps": race.steps,
        "per_device_train_batch_size": race.batch_size,
        "per_device_eval_batch_size": race.batch_size,
        "learning_rate": learning_rate,
        "logging_steps": 10 if race.measure == "training_run" else 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
        "bf16": race.dtype == "bfloat16",
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device != "cpu",
        "gradient_checkpointing": False,
        "torch_compile": race.compiled,
        **(
            {"predict_with_generate": True, "generation_num_beams": race.num_beams}
            if race.measure == "generation"
            else {}
        ),
    }


def metrics_of(start: Start) -> Any:
    """The metrics of a side that generates."""
    if start.race.measure != "generation":
        return None
    return text_metrics(start.tokenizer, SCORES) if start.race.shape is None else metrics_of_ids


def metrics_of_ids(prediction: EvalPrediction) -> dict[str, float]:
    """What tells texts of random ids apart, which no tokenizer can read."""
    written = prediction.predictions >= FIRST_ORDINARY_TOKEN
    return {
        "generated_length": float(written.sum(axis=1).mean()),
        "mean_id": float(prediction.predictions[written].mean()),
    }


def left_side(start: Start, arguments: dict[str, Any], **further: Any) -> LeftTrainer:
    """`LeftTrainer`, given what a user has: rows of text where the data are text."""
    race = start.race
    return LeftTrainer(
        start.model,
        LeftTrainingArguments(
            peft_method=race.method,
            peft_kwargs=dict(race.peft_kwargs),
            max_length=None,
            distillation_kwargs=options_of(race.lesson) if race.lesson else None,
            **arguments,
            **further,
        ),
        teacher_model=start.teacher,
        train_dataset=start.train,
        eval_dataset=start.evaluation,
        processing_class=start.tokenizer,
        compute_metrics=metrics_of(start),
    )


def options_of(lesson: Lesson) -> dict[str, Any]:
    """As `distillation_kwargs`."""
    return {name: getattr(lesson, name) for name in ("loss", "alpha", "temperature")}


def plain_side(
    start: Start,
    arguments: dict[str, Any],
    seq2seq_trainer: type[Seq2SeqTrainer] = Seq2SeqTrainer,
    sft_trainer: type[SFTTrainer] = SFTTrainer,
) -> Trainer:
    """Transformers' or TRL's trainer with PEFT's own wrapping of the same config."""
    config = build_config(start.model, get_method(start.race.method), start.race.peft_kwargs or {})
    set_seed(SEED)
    model = get_peft_model(start.model, config)
    if start.family == "decoder_only":
        return sft_trainer(
            model,
            SFTConfig(max_length=None, **arguments),
            train_dataset=start.train,
            processing_class=start.tokenizer,
        )
    train, evaluation = (
        rows if "input_ids" in rows.column_names else tokenize_pairs(rows, start.tokenizer, Limits())
        for rows in (start.train, start.evaluation)
    )
    return seq2seq_trainer(
        model,
        Seq2SeqTrainingArguments(**arguments),
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=DataCollatorForSeq2Seq(start.tokenizer),
        processing_class=start.tokenizer,
        compute_metrics=metrics_of(start),
    )


def whole_batches_side(start: Start, arguments: dict[str, Any]) -> LeftTrainer:
    """`LeftTrainer`, whose batches stay as they are until their longest text is written."""
    return left_side(start, arguments, regroup_generation=False)


def not_compiled_side(start: Start, arguments: dict[str, Any]) -> LeftTrainer:
    """`LeftTrainer`, all of whose operations run one by one."""
    return left_side(start, {**arguments, "torch_compile": False})


def frozen_side(start: Start, arguments: dict[str, Any]) -> LeftTrainer:
    """`LeftTrainer` without the adapter's work: gradients reach the embeddings through frozen weights alone."""
    trainer = left_side(start, arguments)
    trainer.create_optimizer()  # over the adapter, which gets no gradients from here on
    trainer.model.base_model.disable_adapter_layers()
    trainer.model.enable_input_require_grads()
    return trainer


def distilling_side(start: Start, arguments: dict[str, Any]) -> Trainer:
    """The plain side, whose trainers compute the loss beside a teacher."""
    from distilling_trainers import FullLogitsTrainer, TrlDivergenceTrainer

    trainer = plain_side(start, arguments, FullLogitsTrainer, TrlDivergenceTrainer)
    trainer.teacher, trainer.lesson = start.teacher, start.race.lesson
    return trainer


SIDES: dict[str, Callable[[Start, dict[str, Any]], Trainer]] = {
    "left": left_side,
    "plain": plain_side,
    "frozen": frozen_side,
    "not_compiled": not_compiled_side,
    "whole_batches": whole_batches_side,
    "full_logits": distilling_side,
    "trl_divergence": distilling_side,
}


# What is measured


def training_step(trainer: Trainer, timer: StepTimerCallback) -> Turn:
    """The median step of a short training."""
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Turn(
        seconds=statistics.median(timer.seconds[WARMUP_STEPS:]),
        first_seconds=timer.seconds[0],
        losses=[whole_loss(trainer, entry) for entry in history],
        gradient_norms=[entry["grad_norm"] for entry in history],
    )


def whole_loss(trainer: Trainer, entry: Mapping[str, float]) -> float:
    """The loss that was trained on. `LeftTrainer` logs that of the task, and the teacher's beside it."""
    if "teacher_loss" not in entry:
        return entry["loss"]
    alpha = trainer.args.distillation_kwargs["alpha"]
    return (1 - alpha) * entry["loss"] + alpha * entry["teacher_loss"]


def training_run(trainer: Trainer, timer: StepTimerCallback) -> Turn:
    """All of `train()`, and the loss on held-out rows after it."""
    seconds, _ = timed(trainer.train)
    return Turn(seconds=seconds, losses=[held_out_loss(trainer, trainer.evaluate())])


def evaluation(trainer: Trainer, timer: StepTimerCallback) -> Turn:
    """A batch of `evaluate()`, on average."""
    seconds, metrics = timed(trainer.evaluate)
    return Turn(seconds=seconds / trainer.args.max_steps, losses=[metrics["eval_loss"]])


def generation(trainer: Trainer, timer: StepTimerCallback) -> Turn:
    """A batch of `evaluate()` with `predict_with_generate`, on average."""
    limit = "max_length" if trainer.model.config.is_encoder_decoder else "max_new_tokens"
    seconds, metrics = timed(lambda: trainer.evaluate(**{limit: GENERATED_TOKENS}))
    return Turn(
        seconds=seconds / trainer.args.max_steps,
        losses=[held_out_loss(trainer, metrics)],
        scores={name: metrics[f"eval_{name}"] for name in TEXT_SCORES if f"eval_{name}" in metrics},
    )


def held_out_loss(trainer: Trainer, metrics: dict[str, float]) -> float:
    """Nats per target token over all evaluation rows. Hugging Face's `eval_loss` is a mean over batches instead."""
    if isinstance(trainer, LeftTrainer):
        return metrics["eval_loss"]
    total = count = 0.0
    for batch in trainer.get_eval_dataloader():
        n_tokens = int(batch["labels"].ne(-100).sum())
        with torch.no_grad():
            total += n_tokens * float(trainer.compute_loss(trainer.model.eval(), trainer._prepare_inputs(batch)))
        count += n_tokens
    return total / count


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """How many seconds `work` took, and what it gave."""
    synchronize()
    began = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - began, result


MEASURES: dict[Measure, Callable[[Trainer, StepTimerCallback], Turn]] = {
    "training_step": training_step,
    "training_run": training_run,
    "evaluation": evaluation,
    "generation": generation,
}
