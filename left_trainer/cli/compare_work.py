"""How `left-trainer compare` runs its cells: here or on a cluster, alone or beside other processes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from left_trainer.cli.errors import user_errors
from left_trainer.plugins import load_plugins
from left_trainer.processes import alone
from left_trainer.ranges import Range

if TYPE_CHECKING:
    from left_trainer.comparison.cell import Cell
    from left_trainer.comparison.engines import Engine
    from left_trainer.comparison.layout import GridOptions
    from left_trainer.comparison.plan_file import PlanFile
    from left_trainer.comparison.results import Result
    from left_trainer.comparison.rows import Summary
    from left_trainer.comparison.worker import Terms

JOBS = Range(at_least=1, at_most=1024)
ATTEMPTS = Range(at_least=1, at_most=100)
TAKEOVER_SECONDS = Range(at_least=1, at_most=86400)
# What a YAML file may hold for these options.
WORK_TYPES: dict[str, tuple[type, ...]] = {
    "attempts": (int,),
    "engine": (str,),
    "engine_options": (dict,),
    "jobs": (int,),
    "launcher": (str,),
    "log_table": (list,),
    "takeover_seconds": (int, float),
}


def add_work_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say who runs the cells, and how."""
    parser.add_argument(
        "--plan",
        action="store_true",
        help="write every run into the output folder, cells/NAME/cell.json, and start none",
    )
    parser.add_argument(
        "--work",
        action="store_true",
        help="run what --plan has written in --output_dir, beside any number of such processes, on this machine and on "
        "others that see the folder, until all of it is finished; what to run is read from the folder alone",
    )
    parser.add_argument(
        "--takeover_seconds",
        type=float,
        metavar="S",
        help="a run whose process gives no sign of life for so long is done again by another one (default: 120; at "
        "once where the process was on the same machine). A folder that shows changes late needs more",
    )
    parser.add_argument(
        "--attempts",
        type=int,
        metavar="N",
        help="a run with which so many processes in a row were lost counts as failed (default: 3)",
    )
    parser.add_argument(
        "--engine",
        metavar="NAME",
        help="what starts the runs: local, this machine (default); ray, a Ray cluster; slurm, jobs of SLURM through "
        "submitit. All machines have to see --output_dir",
    )
    parser.add_argument(
        "--engine_options",
        nargs="+",
        metavar="KEY=VALUE",
        help="options of the engine, by its own names. local: fork=false starts every run as a new Python process (by "
        "default, on Linux, it is forked from one that has imported everything). Of a cluster, the resources of each "
        "run. ray: num_gpus, num_cpus, memory, max_retries, ..., and "
        "address, of the cluster. slurm: timeout_min, gpus_per_node, cpus_per_task, mem_gb, slurm_partition, ...",
    )
    parser.add_argument(
        "--launcher",
        metavar="COMMAND",
        help="what starts the processes of each run in the place of python, for models that need several GPUs, such as "
        "'accelerate launch --config_file fsdp2.yaml'; a setting may have its own, NAME=METHOD+launcher='...'",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="number of parallel runs; on one CPU they slow each other down (default: 1, on a cluster all that are "
        "ready)",
    )
    add_table_option(parser)


def add_table_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that logs a table."""
    parser.add_argument(
        "--log_table",
        nargs="+",
        metavar="TRACKER",
        help="log the table to tensorboard, trackio or wandb, where that is installed",
    )


def check_work_alone(options: argparse.Namespace, given: Sequence[str]) -> None:
    """Raise `ValueError` where `--work` is given with options that say what to run."""
    if options.plan:
        raise ValueError("--plan runs nothing and --work plans nothing. Pass --plan once, then --work on each machine.")
    if given:
        raise ValueError(
            f"--work runs what --plan has written in --output_dir and takes no {given[0]}. Pass it with --plan, or "
            "leave out --work."
        )


def engine_of(options: argparse.Namespace) -> Engine | None:
    """The engine that the options ask for; `None` where nothing is to be run.

    Raises:
        ImportError: Its package, or that of a tracker, is not installed.
        ValueError: A number out of range, an engine, an option of it or a tracker that there is not.
    """
    from left_trainer.comparison.engines import ENGINES, make_engine
    from left_trainer.comparison.table_log import check_trackers
    from left_trainer.registry import did_you_mean

    check_trackers(options.log_table or ())
    for name, allowed in (("jobs", JOBS), ("attempts", ATTEMPTS)):
        value = getattr(options, name)
        if value is not None and (type(value) is not int or value not in allowed):
            raise ValueError(f"{name}={value!r} must be an integer, {allowed}.")
    seconds = options.takeover_seconds
    if seconds is not None and seconds not in TAKEOVER_SECONDS:
        raise ValueError(f"takeover_seconds={seconds!r} must be a number, {TAKEOVER_SECONDS}.")
    engine = options.engine or "local"
    if engine not in ENGINES:
        raise ValueError(
            f"engine={engine!r} is not known.{did_you_mean(engine, ENGINES)} Expected one of {', '.join(ENGINES)}."
        )
    if options.plan and options.engine:
        raise ValueError(f"--plan runs nothing and takes no --engine. Pass --work --engine {engine} afterwards.")
    if options.plan or options.print_config:
        return None
    return make_engine(engine, options.jobs, _engine_options(options.engine_options), Path(options.output_dir))


def plan_and_run(options: argparse.Namespace, grid_options: GridOptions, engine: Engine | None, command: str) -> int:
    """Plan a comparison, and run it where there is an engine.

    Returns:
        0 when every run succeeded, or all are planned; 1 when one failed; 130 after an interrupt.
    """
    from left_trainer.comparison.grid import make_grid
    from left_trainer.comparison.plan_file import PlanFile
    from left_trainer.comparison.results import check_comparable, read_cells
    from left_trainer.comparison.worker import prepare
    from left_trainer.storage.locks import folder_lock
    from left_trainer.storage.whole import sweep

    output_dir = Path(options.output_dir)
    with user_errors():
        grid = make_grid(grid_options, output_dir)
        earlier = [result for result in read_cells(output_dir).values() if result.report is not None]
        check_comparable([*grid.cells, *(result.cell for result in earlier)])
        lock = contextlib.ExitStack()
        lock.enter_context(folder_lock(output_dir))
    for method, reason in grid.left_out.items():
        print(f"Skipping {method}: {reason}", file=sys.stderr)
    if grid.no_general_loss:
        print(f"Forgetting is not measured: {grid.no_general_loss}", file=sys.stderr)
    with lock:
        sweep(output_dir)
        plan = PlanFile(grid, str(Path.cwd()), options.title or "", command)
        schedule = prepare(plan, output_dir)
        if engine is not None:
            return _run(plan, output_dir, engine, _terms(options), options.log_table or (), is_alone=True)
    n_runs = len(schedule.cells) + schedule.n_unknown
    print(f"{n_runs} runs are planned in {output_dir}; {len(earlier)} results are there.")
    print(f"Run them on every machine that sees the folder: left-trainer compare --work --output_dir {output_dir}")
    return 0


def work(options: argparse.Namespace, engine: Engine | None) -> int:
    """Run what is planned, beside other processes. Returns as `plan_and_run` does."""
    from left_trainer.comparison.plan_file import PlanFile

    for name in os.environ.keys() - alone(os.environ).keys():
        del os.environ[name]  # `srun` may start many of these processes, which are no run together
    output_dir = Path(options.output_dir)
    with user_errors():
        plan = PlanFile.read(output_dir)
        load_plugins(name for cell in plan.grid.cells for name in cell.plugins)
    assert engine is not None
    return _run(plan, output_dir, engine, _terms(options, leaves_out=False), options.log_table or (), is_alone=False)


def _terms(options: argparse.Namespace, **given: Any) -> Terms:
    from left_trainer.comparison.worker import Terms

    names = ("takeover_seconds", "attempts")
    return Terms(**{name: value for name in names if (value := getattr(options, name)) is not None}, **given)


def _engine_options(given: Any) -> dict[str, Any]:
    """`KEY=VALUE` as a mapping, numbers as numbers; from YAML it is one."""
    if isinstance(given, dict):
        return given
    found: dict[str, Any] = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"engine_options has {text!r}. Write KEY=VALUE, such as num_gpus=1.")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _run(
    plan: PlanFile, output_dir: Path, engine: Engine, terms: Terms, trackers: Sequence[str], is_alone: bool
) -> int:
    """Run a plan, show how far it is, and write tables and page.

    Args:
        plan: What to run.
        output_dir: Of the comparison.
        engine: What runs it.
        terms: Beside other processes.
        trackers: That get the table.
        is_alone: Whether this process alone writes tables and page, and does so after each run.
    """
    from left_trainer.cli.run_display import RunDisplay
    from left_trainer.comparison.results import are_shown, read_cells
    from left_trainer.comparison.table_log import log_table
    from left_trainer.comparison.tables import terminal
    from left_trainer.comparison.worker import Worker

    earlier = {name: result for name, result in read_cells(output_dir).items() if result.report is not None}

    def results() -> list[Result]:
        others = [result for name, result in earlier.items() if name not in worker.schedule.by_name]
        return [*worker.results(), *others]

    def on_result(result: Result) -> None:
        is_new = result.cell.name not in earlier
        display.result(result.cell.title, _line(result) if is_new else None)
        if is_new and is_alone and are_shown(results()):
            _write(results(), output_dir, plan, plots=False)

    def on_added(cell: Cell) -> None:
        display.add(f"{cell.title}: added, as the best learning rate is at the edge of those tried")

    def on_progress(cell: Cell, doing: str, log: Path) -> None:
        display.progress(cell.title, doing, log)

    worker = Worker(output_dir, plan, engine, terms, on_result, on_progress, on_added)
    n_runs = len(worker.schedule.cells) - len(worker.schedule.added) + worker.schedule.n_unknown
    print(f"{n_runs} runs; {output_dir} already contains {len(earlier)} results.", flush=True)
    try:
        with RunDisplay(n_runs) as display:
            is_finished = worker.run()
    except KeyboardInterrupt:
        print("\nInterrupted. Start the same command again: finished runs are kept.", file=sys.stderr)
        return 130
    if not is_finished:
        for name, reason in worker.too_large.items():
            print(f"{worker.schedule.by_name[name].title}: {reason}", file=sys.stderr)
        print(f"{len(worker.too_large)} runs are left to processes on larger machines.", file=sys.stderr)
        return 1
    summary = _write(results(), output_dir, plan, plots=True)
    log_table(trackers, summary, output_dir)
    print(terminal(summary, output_dir))
    return 1 if summary.failures else 0


def _write(results: Sequence[Result], output_dir: Path, plan: PlanFile, plots: bool) -> Summary:
    """Write tables and page, unless another process is about to: it writes the same."""
    from left_trainer.comparison.output import predictions_of, write_outputs
    from left_trainer.comparison.summary import summarize
    from left_trainer.storage.locks import FolderInUseError, folder_lock

    try:
        with folder_lock(output_dir):
            return write_outputs(results, output_dir, plan.title, plan.command, plots)
    except FolderInUseError:
        return summarize(results, plan.title, plan.command, predictions_of(results, output_dir))


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
