"""`left-trainer compare`: compare methods and settings on tasks."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from left_trainer.argument_parser import ArgumentParser
from left_trainer.cli.compare_work import WORK_TYPES, add_work_options, check_work_alone, engine_of, plan_and_run, work
from left_trainer.cli.errors import user_errors
from left_trainer.imports import import_stack
from left_trainer.plugins import add_plugin_option, load_plugins, plugins_in
from left_trainer.secret_values import shown_command

if TYPE_CHECKING:
    from left_trainer.comparison.layout import GridOptions

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

on several machines that see one folder:
  left-trainer compare --plan --seeds 5 --output_dir shared/grid         write the runs, start none
  left-trainer compare --work --output_dir shared/grid                   run them, on as many machines as you like
  sbatch --array=0-7 --gpus=1 --wrap "left-trainer compare --work --output_dir shared/grid"
  left-trainer report shared/grid                                        the tables, also while they run
  left-trainer compare --engine ray --engine_options num_gpus=1 num_cpus=4
  left-trainer compare --engine slurm --engine_options gpus_per_node=1 timeout_min=240 slurm_partition=gpu

models that need several GPUs:
  left-trainer compare --launcher "accelerate launch --config_file fsdp2.yaml" --methods full

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
# What a YAML file may hold for the options of a comparison.
TYPES: dict[str, tuple[type, ...]] = {
    "general_text_file": (str,),
    "methods": (str, list),
    "output_dir": (str,),
    "plugin": (str, list),
    "save_adapters": (bool,),
    "seeds": (int, str),
    "set": (str,),
    "tasks": (str, list),
    "title": (str,),
    "tune": (str,),
    "tune_factors": (list,),
    **WORK_TYPES,
}
WORDS = {bool: "true or false", dict: "a mapping", float: "a number", int: "an integer", list: "a list", str: "a text"}
DEFAULT_OUTPUT_DIR = "outputs/compare"
# What --work takes from the plan.
OF_THE_GRID = (
    "methods",
    "tasks",
    "seeds",
    "tune",
    "tune_factors",
    "general_text_file",
    "save_adapters",
    "set",
    "launcher",
    "title",
    "plugin",
    "config",
    "print_config",
)
NOT_IN_YAML = ("config", "arguments", "plan", "work")


def main(argv: list[str]) -> int:
    """Check the input, run what is not finished, write tables, plots and page.

    Returns:
        0 when every run succeeded; 1 when one failed; 130 after an interrupt.
    """
    parser = _parser()
    options, flags = parser.parse_known_args(argv)

    with contextlib.ExitStack() as stack:
        with user_errors():
            if options.work:
                check_work_alone(options, [*flags, *_given(options)])
            _read_config(options)
            options.plugin = plugins_in(argv)
            options.output_dir = options.output_dir or DEFAULT_OUTPUT_DIR
            engine = engine_of(options)
            if engine is not None:
                stack.enter_context(engine)  # what it has started ends where what follows is refused
            import_stack()  # while the engine's own process does
            _without_progress_bars()
            if not options.work:
                grid_options = _grid_options(options, flags)
        if options.print_config:
            print(_as_yaml(grid_options), end="")
            return 0
        command = shown_command(["left-trainer", "compare", *argv])
        return work(options, engine) if options.work else plan_and_run(options, grid_options, engine, command)


def _without_progress_bars() -> None:
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    disable_progress_bars()


def _given(options: argparse.Namespace) -> list[str]:
    """The options that say what to run, as far as they were given."""
    return [f"--{name}" for name in OF_THE_GRID if getattr(options, name)]


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
        "--seeds",
        type=_seeds,
        metavar="N",
        help="number of seeds for each method and task, starting at 42 (default: 1), or FIRST-LAST, such as 45-47, for "
        "machines that share the seeds without sharing a folder",
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
    add_work_options(parser)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options; flags override it")
    return parser


def _seeds(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


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
        if name in NOT_IN_YAML or not hasattr(options, name):
            options.arguments[name] = value
        elif getattr(options, name) is None:
            setattr(options, name, value)


def _grid_options(options: argparse.Namespace, flags: Sequence[str]) -> GridOptions:
    from left_trainer.comparison.flags import DECIDED, flags_of, parse_flags
    from left_trainer.comparison.layout import GridOptions
    from left_trainer.comparison.sets import set_options
    from left_trainer.comparison.settings import split_settings

    given: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("seeds", "tune", "tune_factors", "general_text_file", "save_adapters", "launcher")
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
