"""`left-trainer generate`: generate text with a fine-tuned model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from left_trainer.argument_parser import ArgumentParser
from left_trainer.cli.errors import user_errors
from left_trainer.cli.options import add_loading_options, check_adapter, hub_options, positive
from left_trainer.imports import import_stack
from left_trainer.shown_text import one_line

DESCRIPTION = """Read one text per line from standard input or --input_file, and write one answer per line to standard
output. Prompt, number of beams and length limits are those that the run was scored with: they are read from the folder.
A text that is too long is cut as in training, and the command says so.
"""


def main(argv: list[str]) -> int:
    """Load the adapter and answer each line."""
    parser = ArgumentParser(prog="left-trainer generate", description=DESCRIPTION)
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="output folder of a run, or its name on the Hub"
    )
    parser.add_argument("--input_file", metavar="FILE", help="read texts from FILE instead of standard input")
    parser.add_argument("--prompt", help="prompt template with {source} (default: the one used in training)")
    parser.add_argument(
        "--num_beams", type=positive, help="beams; 1 is greedy decoding (default: as the run was scored)"
    )
    parser.add_argument(
        "--max_new_tokens", type=positive, help="maximum length of an answer (default: as the run was scored, else 128)"
    )
    parser.add_argument("--batch_size", type=positive, default=16, help="texts per batch (default: %(default)s)")
    add_loading_options(parser)
    options = parser.parse_args(argv)

    with user_errors():
        import_stack()
        hub = hub_options(options)
        prompt = options.prompt or _trained_prompt(options.adapter, hub)
        lines = _read_lines(options.input_file)
        from transformers.utils.logging import disable_progress_bar

        from left_trainer.runs.inference import Generator
        from left_trainer.tasks.task import check_prompt

        disable_progress_bar()

        check_prompt(prompt)
        generator = Generator(
            options.adapter,
            num_beams=options.num_beams,
            max_new_tokens=options.max_new_tokens,
            prompt=prompt,
            trust_remote_code=options.trust_remote_code,
            dtype=options.dtype,
            hub=hub,
        )
    for start in range(0, len(lines), options.batch_size):
        prompts = [prompt.format(source=line) for line in lines[start : start + options.batch_size]]
        for answer in generator(prompts):
            print(one_line(answer), flush=True)
    return 0


def _trained_prompt(adapter: str, hub: Mapping[str, Any]) -> str:
    check_adapter(adapter)
    from left_trainer.models.hub import used_folder
    from left_trainer.runs.report import REPORT_FILE, TrainingReport

    folder = Path(used_folder(adapter, hub))
    if not (folder / REPORT_FILE).is_file():
        raise FileNotFoundError(
            f"--adapter {adapter!r} has no {REPORT_FILE} to read the prompt from. Pass --prompt, for example "
            "--prompt '{source}'."
        )
    return TrainingReport.read(folder).prompt


def _read_lines(input_file: str | None) -> list[str]:
    from left_trainer.data.text_files import read_lines

    lines = sys.stdin if input_file is None else read_lines("--input_file", input_file)
    texts = [line.strip() for line in lines]
    if not any(texts):
        raise ValueError("There is no text to answer. Pipe in lines of text, or pass --input_file.")
    return texts
