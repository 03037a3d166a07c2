"""`left-trainer compare`: compare methods and settings on tasks."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from left_trainer.argument_parser import ArgumentParser
from left_trainer.cli.errors import user_errors
from left_trainer.plugins import add_plugin_option, load_plugins, plugins_in
from left_trainer.ranges import Range
from left_trainer.secret_values import shown_command

if TYPE_CHECKING:
    from left_trainer.comparison.cell import Cell
    from left_trainer.comparison.grid import Grid
    from left_trainer.comparison.layout import GridOptions
    from left_trainer.comparison.results import Result
    from left_trainer.comparison.rows import Summary

DESCRIPTION = """Fine-tune one model with several methods on several tasks, each run in a separate process, and compare
parameters, memory, speed and quality. Writes results.jsonl, table.md, table.csv, table.tex, plots and index.html, a
page with sorting, filters and plots.

Without options, runs six methods on four tasks with the embedded model and data; nothing is downloaded. All options of
`left-trainer train` are accepted and apply to every run: --model_name_or_path, --num_train_epochs, --bf16, ...
After an interruption, start the same command again: finished runs are skipped.
"""
EXAMPLES = """examples:
  left-trainer compare
  left-trainer compare --methods lora,ia3,prefix_tuning --tasks summarization,dialogue --seeds 3
  left-trainer compare --methods all --tasks translation --tune learning_rate
  left-trainer compare --model_name_or_path google/mt5-small --tasks translation --train_file train.jsonl \\
      --test_file test.jsonl --num_train_epochs 3 --output_dir outputs/mt5
  left-trainer compare --methods 'teacher=full,student=full+shrink_to=params=0.5+teacher_model={teacher}'
  left-trainer compare --set smaller --seeds 3
  left-trainer compare --set smaller --model_name_or_path embedded/llama --print_config
  left-trainer compare --config grid.yaml

grid.yaml, with data for each task and options for each method:
  model_name_or_path: google/flan-t5-base
  seeds: 3
  methods:
    - ia3
    - {peft_method: lora, peft_kwargs: {r: 8}}
    - {peft_method: lora, peft_kwargs: {r: 64}, learning_rate: 1e-4}
    - {name: lora on all layers, peft_method: lora, peft_kwargs: {target_modules: all-linear}}
  tasks:
    - {task: summarization, train_file: news/train.jsonl, test_file: news/test.jsonl}
    - {task: dialogue, train_file: chats.jsonl, source_column: context, target_column: answer}
"""
JOBS = Range(at_least=1, at_most=1024)
# What a YAML file may hold for the options of a comparison.
TYPES: dict[str, tuple[type, ...]] = {
    "general_text_file": (str,),
    "jobs": (int,),
    "methods": (str, list),
    "output_dir": (str,),
    "plugin": (str, list),
    "save_adapters": (bool,),
    "seeds": (int,),
    "set": (str,),
    "tasks": (str, list),
    "title": (str,),
    "tune": (str,),
    "tune_factors": (list,),
}
WORDS = {bool: "true or false", int: "an integer", list: "a list", str: "a text"}
DEFAULT_OUTPUT_DIR = "outputs/compare"


def main(argv: list[str]) -> int:
    """Check the input, run what is not finished, write tables, plots and page.

    Returns:
        0 when every run succeeded; 1 when one failed; 130 after an interrupt.
    """
    parser = _parser()
    options, flags = parser.parse_known_args(argv)

    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    from left_trainer.comparison.grid import make_grid
    from left_trainer.comparison.results import check_comparable, read_cells
    from left_trainer.storage.locks import folder_lock
    from left_trainer.storage.whole import sweep

    disable_progress_bar()
    disable_progress_bars()
    with user_errors():
        _read_config(options)
        options.plugin = plugins_in(argv)
        grid_options = _grid_options(options, flags)
        if options.print_config:
            print(_as_yaml(grid_options), end="")
            return 0
        output_dir = Path(options.output_dir)
        grid = make_grid(grid_options, output_dir)
        earlier = {name: result for name, result in read_cells(output_dir).items() if result.report is not None}
        check_comparable([*grid.cells, *(result.cell for result in earlier.values())])
        lock = contextlib.ExitStack()
        lock.enter_context(folder_lock(output_dir))
    for method, reason in grid.left_out.items():
        print(f"Skipping {method}: {reason}", file=sys.stderr)
    if grid.no_general_loss:
        print(f"Forgetting is not measured: {grid.no_general_loss}", file=sys.stderr)
    with lock:
        sweep(output_dir)
        return _run(grid, earlier, output_dir, options, shown_command(["left-trainer", "compare", *argv]))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="left-trainer compare",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="names of methods, settings NAME=METHOD+FIELD=VALUE+... with any argument of left-trainer train, or all "
        "(default: six common methods)",
    )
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="task names (default: all four)")
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="number of seeds for each method and task, starting at 42 (default: 1)"
    )
    parser.add_argument(
        "--tune",
        metavar="learning_rate",
        help="first try several learning rates for each method and task, and keep the best on the validation split",
    )
    parser.add_argument(
        "--tune_factors",
        nargs="+",
        type=float,
        metavar="X",
        help="learning rates to try, as multiples of the default (default: 0.333 1 3); where the best is "
        "at an edge, up to two more are tried beyond it",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="number of parallel runs; on one CPU they slow each other down (default: 1)",
    )
    parser.add_argument(
        "--general_text_file",
        metavar="FILE",
        help="plain text, or JSONL with the field text, for measuring forgetting (default: generated English text)",
    )
    parser.add_argument(
        "--save_adapters", action="store_true", default=None, help="save the trained weights of each run"
    )
    parser.add_argument(
        "--set",
        metavar="NAME",
        help="methods and tasks that belong together: default, or smaller, which compares ways to a smaller model",
    )
    parser.add_argument(
        "--print_config",
        action="store_true",
        help="print what would be compared as YAML for --config, and run nothing",
    )
    add_plugin_option(parser)
    parser.add_argument("--title", metavar="TEXT", help="title of the tables and the page")
    parser.add_argument("--output_dir", metavar="DIR", help=f"output folder (default: {DEFAULT_OUTPUT_DIR})")
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options; flags override it")
    return parser


def _read_config(options: argparse.Namespace) -> None:
    """Read options that are not given as flags from the YAML file; options of single runs go to `arguments`."""
    from left_trainer.yaml_files import read_yaml_arguments

    options.arguments = {}
    if options.config is None:
        return
    content = read_yaml_arguments(options.config)
    for name, value in content.items():
        expected = TYPES.get(name)
        if value is not None and expected and type(value) not in expected:
            raise TypeError(
                f"config={options.config!r} has {name}={value!r}, which must be "
                f"{' or '.join(WORDS[kind] for kind in expected)}."
            )
        if name in ("config", "arguments") or not hasattr(options, name):
            options.arguments[name] = value
        elif getattr(options, name) is None:
            setattr(options, name, value)


def _grid_options(options: argparse.Namespace, flags: Sequence[str]) -> GridOptions:
    from left_trainer.comparison.flags import DECIDED, flags_of, parse_flags
    from left_trainer.comparison.layout import GridOptions
    from left_trainer.comparison.sets import set_options
    from left_trainer.comparison.settings import split_settings

    options.output_dir = options.output_dir or DEFAULT_OUTPUT_DIR
    options.jobs = 1 if options.jobs is None else options.jobs
    if not isinstance(options.jobs, int) or options.jobs not in JOBS:
        raise ValueError(f"jobs={options.jobs!r} must be an integer, {JOBS}.")
    given: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("seeds", "tune", "tune_factors", "general_text_file", "save_adapters")
        if getattr(options, name) is not None
    }
    given["plugin"] = load_plugins(options.plugin)  # by absolute paths, for processes elsewhere
    arguments = parse_flags([*flags_of(options.arguments), *flags], tuple(DECIDED))
    of_set = set_options(options.set or "default", arguments)
    splits = {"methods": split_settings, "tasks": lambda text: [name.strip() for name in text.split(",")]}
    for name, split in splits.items():
        entries = of_set.pop(name, None)
        if getattr(options, name) is not None:
            entries = _entries(getattr(options, name), split)
        if entries is not None:
            given[name] = entries
    return GridOptions(arguments={**of_set, **arguments}, **given)


def _entries(given: Any, split: Callable[[str], list[str]]) -> list[Any]:
    """What is written in one text, separated by commas, or in several, or in the entries of a YAML list."""
    entries = [given] if isinstance(given, (str, dict)) else given
    parts = [split(entry) if isinstance(entry, str) else [entry] for entry in entries]
    return [entry for part in parts for entry in part if entry != ""]


def _as_yaml(options: GridOptions) -> str:
    """The options as a file for `--config`, those at their defaults left out but for methods and tasks."""
    import dataclasses

    import yaml

    from left_trainer.secret_values import without_secrets

    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    named = ("arguments", "methods", "tasks")
    others = {name: value for name, value in values.items() if name not in named and value != defaults[name]}
    shown = {name: list(value) if isinstance(value, tuple) else value for name, value in others.items()}
    content = {**options.arguments, **shown, "tasks": list(options.tasks), "methods": list(options.methods)}
    return yaml.safe_dump(
        without_secrets(content), sort_keys=False, default_flow_style=None, allow_unicode=True, width=120
    )


def _run(grid: Grid, earlier: dict[str, Result], output_dir: Path, options: argparse.Namespace, command: str) -> int:
    from left_trainer.cli.run_display import RunDisplay
    from left_trainer.comparison.output import write_outputs
    from left_trainer.comparison.runner import Runner
    from left_trainer.comparison.tables import terminal

    results = dict(earlier)

    def write(plots: bool) -> Summary:
        return write_outputs(list(results.values()), output_dir, options.title or "", command, plots)

    print(f"{len(grid.cells)} runs; {output_dir} already contains {len(earlier)} results.", flush=True)

    def on_result(result: Result) -> None:
        is_new = earlier.get(result.cell.name) != result
        results[result.cell.name] = result
        display.result(result.cell.title, _line(result) if is_new else None)
        if is_new:
            write(plots=False)

    def on_progress(cell: Cell, doing: str, log: Path) -> None:
        display.progress(cell.title, doing, log)

    def on_widen(cell: Cell) -> None:
        display.add(f"{cell.title}: added, as the best learning rate is at the edge of those tried")

    try:
        with RunDisplay(len(grid.cells)) as display:
            Runner(output_dir, options.jobs, on_result, on_progress, on_widen).run_grid(grid)
    except KeyboardInterrupt:
        print("\nInterrupted. Start the same command again: finished runs are kept.", file=sys.stderr)
        return 130
    summary = write(plots=True)
    print(terminal(summary, output_dir))
    return 1 if summary.failures else 0


def _line(result: Result) -> str:
    """The result of one run, for the terminal."""
    from left_trainer.tasks import get_task

    cell = result.cell
    if result.report is None:
        return f"{cell.title}: failed. {result.failure}"
    metric = get_task(cell.task).main_metric
    metrics = result.report.metrics
    score = ((metrics.before if cell.kind == "base" else metrics.after) or {}).get(metric)
    shown = "not a number" if score is None else f"{score:.1f}"
    split = " on the validation split" if cell.kind == "trial" else ""
    return f"{cell.title}: {metric}{split} {shown}"
