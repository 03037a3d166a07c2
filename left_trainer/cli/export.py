"""`left-trainer export`: write a trained model for another runtime."""

from __future__ import annotations

import argparse
import sys

from left_trainer.argument_parser import ArgumentParser
from left_trainer.cli.errors import user_errors
from left_trainer.cli.options import add_loading_options, add_row_options, positive
from left_trainer.imports import import_stack

DESCRIPTION = """Write a trained model in the format of the runtime that serves it: ctranslate2, gguf, onnx, merged
(transformers) or lora (vLLM, PEFT).

Before the folder appears, the runtime answers the run's own test rows, greedy, and its answers are compared with those
of the trained model. Differences are shown; where they are larger than rounding, nothing is written.
"""
EXAMPLES = """examples:
  left-trainer export --adapter outputs/lora --to ctranslate2 --quantization int8
  left-trainer export --adapter outputs/lora --to gguf --output_dir outputs/gguf
  left-trainer export --adapter outputs/vera --to lora --rank 16
  left-trainer export --adapter outputs/lora --to onnx --test_file test.jsonl --verify_rows 20
"""


def main(argv: list[str]) -> int:
    """Check, write, verify."""
    options = _parser().parse_args(argv)
    with user_errors():
        from pathlib import Path

        if not Path(options.adapter).is_dir():
            raise FileNotFoundError(
                f"--adapter {options.adapter!r} does not exist. Pass the output_dir of a training run."
            )
        import_stack()
        from transformers.utils.logging import disable_progress_bar

        from left_trainer.export.exporting import Export, export_model
        from left_trainer.export.rows import RowsAsked

        disable_progress_bar()
        exported = export_model(
            Export(
                path=options.adapter,
                to=options.to,
                output_dir=options.output_dir,
                precision=options.quantization,
                rows=RowsAsked(
                    options.test_file,
                    options.task,
                    options.prompt,
                    options.source_column,
                    options.target_column,
                    options.verify_rows,
                ),
                max_new_tokens=options.max_new_tokens,
                rank=options.rank,
                as_adapter=options.as_adapter,
                trust_remote_code=options.trust_remote_code,
                dtype=options.dtype,
            )
        )
    if exported.verification.differs_often:
        print(exported.verification.warning(exported.precision), file=sys.stderr)
    print(f"{exported.verification}\nThe export, in {exported.precision}, is in {exported.folder}. To load it:")
    print(exported.usage)
    return 0


def _rank(text: str) -> int | float:
    """A number of dimensions, or a share of what is to be held."""
    try:
        value: int | float = int(text) if text.isdigit() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number.") from None
    if value <= 0 or (isinstance(value, float) and value > 1):
        raise argparse.ArgumentTypeError(f"{text} must be a rank of at least 1, or a share between 0 and 1.")
    return value


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="left-trainer export",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--adapter", required=True, metavar="DIR", help="output folder of a training run")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="ctranslate2, gguf, onnx, merged or lora")
    parser.add_argument("--output_dir", metavar="DIR", help="new folder (default: that of the run, with -FORMAT)")
    parser.add_argument(
        "--quantization", metavar="NAME", help="precision of the weights, int8 or q8_0 say (default: that of the run)"
    )
    parser.add_argument(
        "--rank", type=_rank, metavar="N", help="of a LoRA for a method that is none: a rank, or the share to hold"
    )
    parser.add_argument(
        "--as_adapter", action="store_true", help="gguf: write the adapter alone, as llama.cpp's --lora takes it"
    )
    parser.add_argument(
        "--verify_rows", type=positive, default=50, metavar="N", help="test rows to compare (default: %(default)s)"
    )
    parser.add_argument("--max_new_tokens", type=positive, metavar="N", help="of the answers that are compared")
    add_row_options(
        parser,
        "rows to compare, in place of the run's own test rows",
        "task of --test_file (default: that of the run)",
    )
    parser.add_argument("--prompt", help="prompt template with {source} (default: that of the run)")
    add_loading_options(parser)
    return parser
