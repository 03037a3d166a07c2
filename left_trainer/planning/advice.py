"""What to change so that a run fits, found by planning again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from left_trainer.methods import get_method
from left_trainer.planning.plan import TrainingPlan
from left_trainer.training_args import LeftTrainingArguments

# Plans the run with other values of arguments, with `source_tokens` and `dtype` among them.
Replan = Callable[..., TrainingPlan]
WORTH_SAYING = 0.02  # of what the run needs
MOST_ROWS, MOST_TOKENS = 4096, 2**20
ROWS = "per_device_train_batch_size"


@dataclass(frozen=True)
class Change:
    """A change of the arguments.

    Args:
        flags: To paste.
        cost: What it costs, in a sentence.
        values: Of the arguments.
    """

    flags: str
    cost: str
    values: dict[str, Any]


def smaller_batches(args: LeftTrainingArguments) -> Iterator[Change]:
    """Half the rows of a micro-batch and twice as many of them, a quarter and four times as many, and so on."""
    rows, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    while rows % 2 == 0:
        rows, steps = rows // 2, steps * 2
        yield Change(
            f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {steps}",
            "the same training; smaller batches use the device less well",
            {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps},
        )


def changes(args: LeftTrainingArguments, dtype: str) -> Iterator[Change]:
    """What may be tried."""
    method = get_method(args.peft_method)
    yield from itertools.islice(smaller_batches(args), 1)
    if not args.gradient_checkpointing and method.supports("gradient_checkpointing"):
        yield Change(
            "--gradient_checkpointing true",
            "the same training; a second forward pass, a third more computation",
            {"gradient_checkpointing": True},
        )
    if dtype == "float32" and not args.bf16:
        yield Change("--bf16", "products in bfloat16; faster where the device has it", {"bf16": True})
    if dtype == "float32" and method.config_class is not None:
        yield Change(
            "--dtype bfloat16",
            "all but the adapter in bfloat16, as most checkpoints are; faster, less exact",
            {"dtype": "bfloat16"},
        )
    if method.name == "lora" and method.supports("quantized_base"):
        yield Change(
            "--peft_method qlora",
            "the base in 4 bits: a little of the quality, and time to unpack it",
            {"peft_method": "qlora"},
        )
    if method.config_class is None:
        yield Change(
            "--optim adamw_bnb_8bit",
            "optimizer state in 8 bits, about the same training",
            {"optim": "adamw_bnb_8bit"},
        )
        yield Change("--peft_method lora", "an adapter in place of all weights", {"peft_method": "lora"})
    if args.predict_with_generate and args.per_device_eval_batch_size > 1:
        half = args.per_device_eval_batch_size // 2
        yield Change(f"--per_device_eval_batch_size {half}", "slower evaluations", {"per_device_eval_batch_size": half})


def advice(
    plan: TrainingPlan, replan: Replan, args: LeftTrainingArguments, dtype: str
) -> list[tuple[Change, TrainingPlan]]:
    """The changes that save memory, the largest saving first, each with its plan."""
    found = []
    for change in changes(args, dtype):
        other = _replanned(replan, change.values)
        if other is not None and other.run_bytes < plan.run_bytes * (1 - WORTH_SAYING):
            found.append((change, other))
    return sorted(found, key=lambda pair: pair[1].run_bytes)


def together(
    plan: TrainingPlan,
    replan: Replan,
    in_order: Iterable[Change],
    args: LeftTrainingArguments,
    memory_bytes: int,
) -> tuple[list[Change], TrainingPlan]:
    """Changes on top of one another until the run fits, a smaller batch last; and the plan that they come to.

    Args:
        plan: Of the run as it is.
        replan: Plans it with changes.
        in_order: What to try, the best first.
        args: Of the run.
        memory_bytes: Of the device.
    """
    kept: list[Change] = []
    values: dict[str, Any] = {}
    best = plan
    for change in in_order:
        if best.fits(memory_bytes) or ROWS in change.values:
            continue
        other = _replanned(replan, {**values, **change.values})
        if other is not None and other.run_bytes < best.run_bytes * (1 - WORTH_SAYING):
            kept, values, best = [*kept, change], {**values, **change.values}, other
    for smaller in smaller_batches(args):
        share = smaller.values[ROWS] / best.batch.rows  # so many of the rows need no less of the memory
        if best.fits(memory_bytes) or share * best.peak_bytes > memory_bytes:
            continue
        other = _replanned(replan, {**values, **smaller.values})
        if other is not None and other.run_bytes < best.run_bytes:
            kept, best = [*(change for change in kept if ROWS not in change.values), smaller], other
    return kept, best


def _replanned(replan: Replan, values: dict[str, Any]) -> TrainingPlan | None:
    """The plan with `values`; `None` where they do not go together with the other arguments."""
    try:
        return replan(**values)
    except (ValueError, ImportError):
        return None


def largest(need: Callable[[int], float], limit: float, known: tuple[int, float], most: int) -> int:
    """The largest number up to `most` whose `need` is at most `limit`, and 0 where there is none.

    Exact up to 32, then within three percent. What a run needs is close to a line in its rows or tokens, so each guess
    lies where the line through the last two meets the limit.

    Args:
        need: Grows with the number; infinite for one that is not allowed.
        limit: Of the need.
        known: A number and its need.
        most: The largest number that is tried.
    """
    number, size = known
    low, high, before = 0, most + 1, (0, math.nan)
    while True:
        low, high = (number, high) if size <= limit else (low, number)
        step = max(1, low // 32)
        if high - low <= step:
            return low
        slope = (size - before[1]) / (number - before[0])
        if math.isfinite(slope) and slope > 0:
            guess = number + int((limit - size) // slope)
        else:
            guess = 4 * number if size <= limit else (low + high) // 2  # another phase of the run needs more
        before = (number, size)
        number = min(max(guess, low + step), max(high - step, low + 1))
        size = need(number)


def largest_batch(plan: TrainingPlan, replan: Replan, memory_bytes: int) -> int:
    """Rows of a micro-batch that fit."""
    if plan.device.overhead_bytes + max(plan.loading_bytes, plan.evaluation_bytes, plan.saving_bytes) > memory_bytes:
        return 0  # whatever the batch
    known = (plan.batch.rows, plan.run_bytes)
    return largest(lambda rows: replan(**{ROWS: rows}).run_bytes, memory_bytes, known, MOST_ROWS)


def longest_source(plan: TrainingPlan, replan: Replan, memory_bytes: int) -> int:
    """Tokens of a source that fit and that the model has positions for."""

    def need(tokens: int) -> float:
        other = _replanned(replan, {"source_tokens": tokens})
        return math.inf if other is None else other.run_bytes

    return largest(need, memory_bytes, (plan.batch.source, plan.run_bytes), MOST_TOKENS)
