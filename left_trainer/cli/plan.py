"""`left-trainer plan`: the memory and the time of a run before it starts."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from left_trainer.argument_parser import ArgumentParser
from left_trainer.cli.errors import user_errors
from left_trainer.cli.options import number, positive
from left_trainer.cli.plan_text import (
    GIB,
    RunTime,
    as_record,
    changes_text,
    draw,
    limits_text,
    plan_text,
    ranking_text,
    run_text,
    time_text,
    together_text,
    verdict_text,
)
from left_trainer.imports import import_stack
from left_trainer.ranges import POSITIVE

if TYPE_CHECKING:
    from left_trainer.planning.devices import Device
    from left_trainer.planning.lengths import RowLengths
    from left_trainer.planning.plan import TrainingPlan
    from left_trainer.tasks import Task

DESCRIPTION = """Say what memory a run needs and how long a step takes, before it starts: without its weights and
without a GPU. All options of `left-trainer train` are accepted. The training step is run on shapes, from the
model's config alone.

With --memory_gib or --device it says whether the run fits, the largest batch and the longest source that do, and
what to change.
"""
EXAMPLES = """examples:
  left-trainer plan --model_name_or_path meta-llama/Llama-3.1-8B --peft_method qlora --memory_gib 24
  left-trainer plan --model_name_or_path google/mt5-large --source_tokens 512 --target_tokens 64 --methods all
  left-trainer plan --model_name_or_path ./folder-with-config-json --peft_method lora --bf16 --json
"""
WHOLE_VOCABULARY = (
    "This plan is of the whole vocabulary. What shrink_to='vocabulary=data' leaves of it is known once the run "
    "has read its data.\nIt then plans for that, and needs less."
)
DEFAULT_TOKENS = 1024  # of a row, where max_length gives none
PLOT_FILE = "memory_plan.png"


def main(argv: list[str]) -> int:
    """Plan, print, and search for what fits."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)

    import_stack()
    from left_trainer.compression_options import VOCABULARY
    from left_trainer.runs.fine_tuning import training_parser, with_task_settings
    from left_trainer.tasks import get_task

    with user_errors():
        device = _device(options.device)
        memory_bytes = device.memory_bytes if device else None
        if options.memory_gib is not None:
            memory_bytes = int(options.memory_gib * GIB)
        task = get_task(options.task)
        full = training_parser(output_dir="outputs/plan")
        full.prog = parser.prog
        model_args, data_args, args, *_ = full.parse_args_and_config([*rest])
        args = with_task_settings(task, args)
        planner = _Planner(
            model_args, args, options, task.max_new_tokens, device, _rows(task, data_args, model_args, args)
        )
        if options.methods:
            _rank(planner, options, memory_bytes)
            return 0
        plan = planner.plan()
        if options.plot:
            draw(plan, options.plot, memory_bytes)
        run = planner.run_time()
        if options.json:
            print(json.dumps(as_record(plan, device) | (asdict(run) if run else {}), indent=2))
            return 0
        print(plan_text(plan), time_text(plan, device, args.gradient_accumulation_steps), sep="\n", flush=True)
        if VOCABULARY in args.target_size:
            print(WHOLE_VOCABULARY, flush=True)
        if run is not None:
            print(run_text(run), flush=True)
        if memory_bytes is not None:
            _advise(planner, plan, memory_bytes)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="left-trainer plan",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", default="summarization", help="task, for generation settings (default: %(default)s)")
    parser.add_argument(
        "--memory_gib",
        type=number(POSITIVE, float),
        metavar="X",
        help="memory of the device; by default that of --device",
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="a GPU such as rtx-4090, which also gives the time; this for the machine at hand, which is measured; "
        "cuda or cpu (default: cuda)",
    )
    parser.add_argument(
        "--source_tokens",
        type=positive,
        metavar="N",
        help="tokens of the longest source or prompt; by default of the data that --train_file or --dataset_name names",
    )
    parser.add_argument(
        "--target_tokens", type=positive, metavar="N", help="tokens of the longest target or completion"
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="rank these methods, or all")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--plot", nargs="?", const=PLOT_FILE, metavar="FILE", help=f"write a plot ({PLOT_FILE})")
    return parser


def _device(name: str | None) -> Device | None:
    """The record of a name, or of a measurement; `None` where only the kind of device is given."""
    if name in (None, "cuda", "cpu"):
        return None
    if name == "this":
        from left_trainer.planning.probe import probe

        return probe()
    from left_trainer.planning.devices import find_device

    return find_device(name)


def _rows(task: Task, data_args: Any, model_args: Any, args: Any) -> RowLengths | None:
    """The lengths of the data that the flags name, as a run cuts its rows; `None` where they name none."""
    if data_args.dataset_name is None and data_args.train_file is None:
        return None
    from datasets import disable_progress_bars

    from left_trainer.models import load_tokenizer
    from left_trainer.planning.lengths import task_lengths
    from left_trainer.trainer.checks import Request
    from left_trainer.trainer.preparation import free_positions, method_of

    disable_progress_bars()
    source = model_args.source(args)
    found = task_lengths(task, data_args, source, load_tokenizer(source))
    free = free_positions(Request(source, args, method_of(source, args, None)), args.peft_options)
    return found and found.cut(source.family, *free.at_most(args.max_length))


def _at_most_positions(tokens: int, source: Any, args: Any) -> int:
    """`tokens`, which nobody asked for, or as many as the model and the method have positions."""
    from left_trainer.methods import get_method
    from left_trainer.models.positions import position_limits

    limit = position_limits(source.config, with_rotary=True).source
    taken = get_method(args.peft_method).positions(args.peft_options, source.family).source if args.peft_method else 0
    return tokens if limit is None else max(1, min(tokens, limit - taken))


class _Planner:
    """Plans the run of the command line, with changes."""

    def __init__(
        self,
        model_args: Any,
        args: Any,
        options: argparse.Namespace,
        new_tokens: int,
        device: Device | None,
        rows: RowLengths | None,
    ) -> None:
        self.model_args, self.args, self.options, self.device, self.rows = model_args, args, options, device, rows
        source = model_args.source(args)
        is_pair = source.family == "encoder_decoder"
        self.target = new_tokens if options.target_tokens is None else options.target_tokens
        longest = _at_most_positions(args.max_length or DEFAULT_TOKENS, source, args)
        rest = longest if is_pair else max(longest - self.target, 1)
        self.source = rest if options.source_tokens is None else options.source_tokens
        if rows is not None and options.source_tokens is None and options.target_tokens is None:
            self.source, self.target = rows.source, rows.target

    def run_time(self) -> RunTime | None:
        """Of the whole run, on average rows; `None` where the data or the speed of the device is not known."""
        if self.rows is None or self.device is None or self.device.bandwidth is None:
            return None
        source, target = round(self.rows.mean_source), max(1, round(self.rows.mean_target))
        seconds = self.plan(source, target).time_on(self.device).seconds
        rows_a_step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        n_steps = math.ceil(self.args.num_train_epochs * self.rows.n_rows / rows_a_step)
        n_steps = self.args.max_steps if self.args.max_steps > 0 else n_steps
        return RunTime(n_steps, self.rows.n_rows, source, target, n_steps * seconds)

    def plan(
        self,
        source_tokens: int | None = None,
        target_tokens: int | None = None,
        dtype: str | None = None,
        peft_method: str | None = None,
        **values: Any,
    ) -> TrainingPlan:
        """The plan of the run with other values."""
        from left_trainer.planning.plan import plan_training

        if peft_method is not None:
            values |= {"peft_method": peft_method, "peft_kwargs": None}
        args = self.args.replaced(**values)
        return plan_training(
            self.model_args.source(args),
            args,
            source_tokens=self.source if source_tokens is None else source_tokens,
            target_tokens=self.target if target_tokens is None else target_tokens,
            dtype=dtype or self.model_args.dtype,
            device=self.device or self.options.device,
        )


def _advise(planner: _Planner, plan: TrainingPlan, memory_bytes: int) -> None:
    """Print whether the run fits, what to change, and the largest batch and source that fit then."""
    from left_trainer.planning.advice import advice, changes, largest_batch, longest_source, together

    print(verdict_text(plan, memory_bytes), flush=True)
    if plan.fits(memory_bytes):
        rows, tokens = largest_batch(plan, planner.plan, memory_bytes), longest_source(plan, planner.plan, memory_bytes)
        print(limits_text(plan, rows, tokens), flush=True)
    found = advice(plan, planner.plan, planner.args, planner.model_args.dtype)
    print(changes_text(plan, found, memory_bytes, planner.device), flush=True)
    if plan.fits(memory_bytes):
        return
    tried = [change for change, _ in found]
    in_order = [*tried, *(each for each in changes(planner.args, planner.model_args.dtype) if each not in tried)]
    kept, best = together(plan, planner.plan, in_order, planner.args, memory_bytes)
    if not kept:
        return
    print(together_text(kept, best, memory_bytes, planner.device), flush=True)
    if best.fits(memory_bytes):
        changed = {name: value for change in kept for name, value in change.values.items()}
        replan = partial(_replan, planner.plan, changed)
        rows, tokens = largest_batch(best, replan, memory_bytes), longest_source(best, replan, memory_bytes)
        print(limits_text(best, rows, tokens))


def _replan(plan: Callable[..., TrainingPlan], changed: dict[str, Any], **values: Any) -> TrainingPlan:
    return plan(**{**changed, **values})


def _rank(planner: _Planner, options: argparse.Namespace, memory_bytes: int | None) -> None:
    """Print a row for each method, the least memory first."""
    from left_trainer.methods import get_method, list_methods

    asked = [name for given in options.methods for name in given.split(",") if name]
    names = (
        [method.name for method in list_methods()] if asked == ["all"] else [get_method(name).name for name in asked]
    )
    plans, left_out = [], {}
    for name in names:
        try:
            plans.append(planner.plan(peft_method=name))
        except (ValueError, ImportError) as error:
            left_out[name] = str(error)
    plans.sort(key=lambda plan: plan.run_bytes)
    if options.json:
        print(json.dumps([as_record(plan, planner.device) for plan in plans], indent=2))
    else:
        print(ranking_text(plans, left_out, memory_bytes, planner.device))
