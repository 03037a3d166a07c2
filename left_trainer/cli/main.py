"""`left-trainer`: import and run the module of the subcommand, and no other."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from types import TracebackType

from left_trainer.argument_parser import ArgumentParser
from left_trainer.cli.errors import user_errors
from left_trainer.cli.program import run_program
from left_trainer.plugins import load_plugins, plugins_in
from left_trainer.registry import did_you_mean
from left_trainer.secret_values import masked, public_words

COMMANDS = {
    "train": "fine-tune a model on a task and evaluate it before and after",
    "plan": "say what memory a run needs before it starts",
    "compare": "compare methods on tasks: parameters, memory, speed, quality",
    "report": "merge comparisons into one table and page",
    "methods": "list the fine-tuning methods",
    "evaluate": "score a fine-tuned model on a test file",
    "generate": "generate text with a fine-tuned model",
    "merge": "merge an adapter into its base model, or several adapters into one",
    "export": "write a trained model for another runtime, verified",
}
EXAMPLES = """examples:
  left-trainer train --task summarization
  left-trainer train --task summarization --model_name_or_path google/flan-t5-small \\
      --train_file train.jsonl --peft_method ia3 --output_dir outputs/ia3
  left-trainer compare --methods lora,ia3,prefix_tuning --tasks summarization,dialogue --seeds 3
  echo "A long text ..." | left-trainer generate --adapter outputs/ia3
  left-trainer evaluate --adapter outputs/ia3 --test_file test.jsonl
  left-trainer merge --adapter outputs/ia3 --output_dir outputs/merged
  left-trainer export --adapter outputs/ia3 --to ctranslate2

left-trainer COMMAND --help shows the options of a command.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        0 on success; 2 for input that cannot be used, with one paragraph on stderr and no traceback; else as
        `run_program`.
    """
    parser = ArgumentParser(
        prog="left-trainer",
        description="LEFT: LLM efficient fine-tuning.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items())
    parser.add_argument("command", nargs="?", metavar="COMMAND", help=f"one of {', '.join(COMMANDS)}")
    parser.description = f"LEFT: LLM efficient fine-tuning.\n\ncommands:\n{commands}"

    arguments = sys.argv[1:] if argv is None else argv
    if argv is None:
        sys.argv[1:] = public_words(arguments)  # which trackers record
        sys.excepthook = _print_masked
    options = parser.parse_args(arguments[:1])
    if options.version:
        from left_trainer import __version__

        print(__version__)
        return 0
    if options.command is None:
        parser.print_help()
        return 2
    if options.command not in COMMANDS:
        parser.error(
            f"unknown command {options.command!r}.{did_you_mean(options.command, COMMANDS)} Allowed: "
            f"{', '.join(COMMANDS)}."
        )

    def run() -> int:
        with user_errors():
            load_plugins(plugins_in(arguments[1:]))
        return int(importlib.import_module(f"left_trainer.cli.{options.command}").main(arguments[1:]))

    return run_program(run)


def _print_masked(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A traceback without the secrets that its error may repeat."""
    print(masked("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
