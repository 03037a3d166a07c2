"""`left-trainer evaluate`: score a fine-tuned model on a test file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from left_trainer.argument_parser import ArgumentParser
from left_trainer.cli.errors import user_errors
from left_trainer.cli.options import add_loading_options, add_row_options, check_adapter, hub_options, number, positive
from left_trainer.imports import import_stack
from left_trainer.ranges import NOT_NEGATIVE

if TYPE_CHECKING:
    from left_trainer.runs.evaluation import EvaluationReport

# What --lm_eval leaves no room for.
DECIDED_BY_TASKS = (
    "test_file", "task", "prompt", "source_column", "target_column", "generation_num_beams", "generation_max_length",
    "max_length",
)  # fmt: skip
DESCRIPTION = """Score a fine-tuned model on the rows of a test file: the loss and the metrics of its task, as
`left-trainer train` reports them at the end of a run. On the test file of the run, the scores are those of its report.

Task, prompt, length limits and beams are read from the folder of the run; an option beats what stands there. A folder
that no run has written needs --task.

With --lm_eval, the model is scored by lm-evaluation-harness (pip install lm-eval) on its tasks, or on your own.
"""
EXAMPLES = """examples:
  left-trainer evaluate --adapter outputs/lora --test_file test.jsonl
  left-trainer evaluate --adapter outputs/lora --test_file test.jsonl --generation_num_beams 4 --output_dir outputs/test
  left-trainer evaluate --adapter outputs/lora --lm_eval hellaswag my_task.yaml --output_dir outputs/lm_eval
  left-trainer evaluate --model_name_or_path outputs/merged --test_file test.csv --task summarization \\
      --source_column article --target_column highlights
"""


def main(argv: list[str]) -> int:
    """Load, predict, print and write the scores."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.lm_eval is not None:
        _check_lm_eval_alone(parser, options)
    elif options.test_file is None:
        parser.error("one of the arguments --test_file --lm_eval is required")
    with user_errors():
        output = Path(options.output_dir) if options.output_dir else None
        import_stack()
        if options.adapter is not None:
            check_adapter(options.adapter)
        from transformers.utils.logging import disable_progress_bar

        from left_trainer.runs.evaluation import EVALUATION_FILE
        from left_trainer.runs.report_text import format_evaluation
        from left_trainer.trainer.run_checks import check_writable

        disable_progress_bar()
        if output is not None and (output / EVALUATION_FILE).exists():
            raise FileExistsError(
                f"--output_dir {options.output_dir!r} already holds {EVALUATION_FILE}. Choose another folder."
            )
        if output is not None:
            check_writable(output)
        report = _on_test_file(options) if options.lm_eval is None else _with_lm_eval(options)
        path = report.write(output) if output else None
    print(format_evaluation(report, path))
    return 0


def _on_test_file(options: argparse.Namespace) -> EvaluationReport:
    from left_trainer.data.arguments import DataArguments
    from left_trainer.runs.evaluation import Evaluation, evaluate_saved

    data = DataArguments(
        test_file=options.test_file,
        source_column=options.source_column,
        target_column=options.target_column,
        prompt=options.prompt,
        max_eval_samples=options.max_eval_samples,
    )
    return evaluate_saved(
        Evaluation(
            path=options.adapter or options.model_name_or_path,
            data=data,
            task=options.task,
            generation_num_beams=options.generation_num_beams,
            generation_max_length=options.generation_max_length,
            max_length=options.max_length,
            per_device_eval_batch_size=options.per_device_eval_batch_size,
            trust_remote_code=options.trust_remote_code,
            dtype=options.dtype,
            hub=hub_options(options),
        )
    )


def _with_lm_eval(options: argparse.Namespace) -> EvaluationReport:
    from left_trainer.runs.lm_evaluation import LmEvaluation, evaluate_with_lm_eval

    return evaluate_with_lm_eval(
        LmEvaluation(
            path=options.adapter or options.model_name_or_path,
            tasks=[name for text in options.lm_eval for name in text.split(",") if name],
            num_fewshot=options.num_fewshot,
            max_eval_samples=options.max_eval_samples,
            per_device_eval_batch_size=options.per_device_eval_batch_size,
            trust_remote_code=options.trust_remote_code,
            dtype=options.dtype,
            hub=hub_options(options),
        )
    )


def _check_lm_eval_alone(parser: ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what the tasks of lm-evaluation-harness decide themselves."""
    for name in DECIDED_BY_TASKS:
        if getattr(options, name) is not None:
            parser.error(f"argument --{name}: not allowed with --lm_eval, whose tasks bring their own")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="left-trainer evaluate",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--adapter", metavar="DIR", help="output folder of a run, or its name on the Hub")
    model.add_argument("--model_name_or_path", metavar="MODEL", help="a whole model: a folder, or its name on the Hub")
    add_row_options(parser, "test rows", "task whose metrics are computed (default: that of the run)")
    parser.add_argument(
        "--lm_eval",
        nargs="+",
        metavar="TASK",
        help="in place of a test file: tasks of lm-evaluation-harness, by name or as YAML files",
    )
    parser.add_argument(
        "--num_fewshot", type=number(NOT_NEGATIVE), metavar="N", help="examples in each prompt of --lm_eval"
    )
    parser.add_argument("--output_dir", metavar="DIR", help="folder for evaluation_report.json (default: only printed)")
    parser.add_argument("--prompt", help="prompt template with {source} (default: that of the run, else of the task)")
    parser.add_argument("--max_eval_samples", type=positive, metavar="N", help="score only the first N rows")
    parser.add_argument(
        "--generation_num_beams", type=positive, metavar="N", help="beams; 1 is greedy (default: as the run was scored)"
    )
    parser.add_argument(
        "--generation_max_length", type=positive, metavar="N", help="most tokens of an answer (default: the same)"
    )
    parser.add_argument("--max_length", type=positive, metavar="N", help="as in training (default: that of the run)")
    parser.add_argument(
        "--per_device_eval_batch_size", type=positive, metavar="N", help="rows of a batch (default: that of the run)"
    )
    add_loading_options(parser)
    return parser
