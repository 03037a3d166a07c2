"""`left-trainer train`: fine-tune a model on a task and evaluate it before and after."""

from __future__ import annotations

import argparse
import sys

from left_trainer.argument_parser import ArgumentParser
from left_trainer.cli.errors import user_errors
from left_trainer.imports import import_stack

DESCRIPTION = """Fine-tune a model on a task, evaluate it on the test split before and after training, and save adapter,
tokenizer, model card, training_report.json and plots to --output_dir.

By default, the embedded model and the task's generated data are used, and nothing is downloaded. All options of
transformers.Seq2SeqTrainingArguments and trl.SFTConfig are accepted, on the command line or from YAML with
--config FILE.
"""


def main(argv: list[str]) -> int:
    """Parse and check the arguments, train, report."""
    task_parser = ArgumentParser(prog="left-trainer train", add_help=False)
    task_parser.add_argument("--task", default="summarization")
    options, rest = task_parser.parse_known_args(argv)

    import_stack()
    from transformers.utils.logging import disable_progress_bar

    from left_trainer.models.hub import HubRefusalError
    from left_trainer.runs.fine_tuning import fine_tune, set_up, training_parser
    from left_trainer.runs.report_text import format_report
    from left_trainer.tasks import get_task, list_tasks
    from left_trainer.trainer.divergence import TrainingDivergedError

    disable_progress_bar()
    with user_errors():
        task = get_task(options.task)
        parser = training_parser(output_dir=f"outputs/{task.name}")
        parser.prog, parser.description = "left-trainer train", DESCRIPTION
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        names = [record.name for record in list_tasks()]
        parser.add_argument("--task", default=task.name, help=f"Task: {', '.join(names)} (default: %(default)s)")
        model_args, data_args, args, *_ = parser.parse_args_and_config(rest)
        run = set_up(task, model_args, data_args, args)
    try:
        report = fine_tune(run)
    except TrainingDivergedError as error:
        print(f"\nleft-trainer: error: {error}", file=sys.stderr)  # below the progress bar
        return 1
    except HubRefusalError as error:
        folder = run.trainer.args.output_dir
        print(f"\nleft-trainer: error: {error} Adapter and report are in {folder}.", file=sys.stderr)
        return 1
    if run.trainer.is_world_process_zero():
        print(format_report(report, run.trainer.args.output_dir))
    return 0
