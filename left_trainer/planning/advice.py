"""What to change so that a run fits, found by planning again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from left_trainer.methods import get_method
from left_trainer.planning.plan import TrainingPlan
from left_trainer.training_args import LeftTrainingArguments

# Plans the run with other values of arguments, with `source_tokens` and `dtype` among them.
Replan = Callable[..., TrainingPlan]
WORTH_SAYING = 0.02  # of what the run needs
MOST_ROWS, MOST_TOKENS = 4096, 2**20


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


def changes(args: LeftTrainingArguments, dtype: str) -> Iterator[Change]:
    """What may be tried, the cheapest first."""
    method = get_method(args.peft_method)
    rows, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if rows > 1 and rows % 2 == 0:
        yield Change(
            f"--per_device_train_batch_size {rows // 2} --gradient_accumulation_steps {steps * 2}",
            "the same training; smaller batches use the device less well",
            {"per_device_train_batch_size": rows // 2, "gradient_accumulation_steps": steps * 2},
        )
    if not args.gradient_checkpointing and method.supports("gradient_checkpointing"):
        yield Change(
            "--gradient_checkpointing",
            "the same training; a third more computation, for a second forward pass",
            {"gradient_checkpointing": True},
        )
    if dtype == "float32" and not args.bf16:
        yield Change("--bf16", "activations in bfloat16; faster where the device has it", {"bf16": True})
    if dtype == "float32" and method.config_class is not None:
        yield Change(
            "--dtype bfloat16", "frozen weights in bfloat16, rounded as most checkpoints are", {"dtype": "bfloat16"}
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
        try:
            other = replan(**change.values)
        except (ValueError, ImportError):
            continue  # it does not go together with the other arguments
        if other.run_bytes < plan.run_bytes * (1 - WORTH_SAYING):
            found.append((change, other))
    return sorted(found, key=lambda pair: pair[1].run_bytes)


def largest(fits: Callable[[int], bool], start: int, most: int) -> int:
    """The largest number up to `most` for which `fits` holds, found from `start`; 0 where it holds for none."""
    low, high = (start, start * 2) if fits(start) else (0, start)
    while low == start and high <= most and low < high:
        if not fits(high):
            break
        low, high, start = high, high * 2, high
    high = min(high, most + 1)
    while high - low > max(1, low // 32):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_batch(plan: TrainingPlan, replan: Replan, memory_bytes: int) -> int:
    """Rows of a micro-batch that fit; exact up to 32, then within three percent."""
    return largest(lambda rows: replan(per_device_train_batch_size=rows).fits(memory_bytes), plan.batch.rows, MOST_ROWS)


def longest_source(plan: TrainingPlan, replan: Replan, memory_bytes: int) -> int:
    """Tokens of a source that fit; within three percent."""

    def fits(tokens: int) -> bool:
        try:
            return replan(source_tokens=tokens).fits(memory_bytes)
        except ValueError:  # more than the model has positions
            return False

    return largest(fits, max(plan.batch.source, 1), MOST_TOKENS)
