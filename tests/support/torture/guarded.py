"""Run an entry point of the library in a process in which no weights may be loaded: `guarded.py ENTRY ARGUMENT ...`.

ENTRY is a command of `left-trainer`, `recipe:NAME`, or `python`, whose argument is code.
"""

from __future__ import annotations

import os
import runpy
import sys

from transformers import PreTrainedModel

import left_trainer
from left_trainer.cli.errors import user_errors
from left_trainer.cli.main import main
from places import REPOSITORY

WEIGHTS_WERE_LOADED = 3
# What the code of a case may use.
GIVEN = {
    "LeftTrainer": left_trainer.LeftTrainer,
    "LeftTrainingArguments": left_trainer.LeftTrainingArguments,
    "ROWS": [{"prompt": "a red house", "completion": " red"}] * 4,
    "T5": str(left_trainer.MODEL_PATHS["encoder_decoder"]),
}


def stop(*args: object, **kwargs: object) -> None:
    print("The weights were loaded before the input was refused.", file=sys.stderr, flush=True)
    os._exit(WEIGHTS_WERE_LOADED)


def run(entry: str, arguments: list[str]) -> int:
    if entry == "python":
        with user_errors():
            exec(arguments[0], dict(GIVEN))
        return 0
    if entry.startswith("recipe:"):
        script = str(REPOSITORY / "recipes" / f"{entry.removeprefix('recipe:')}.py")
        sys.argv[:] = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        return 0
    return main([entry, *arguments])


if __name__ == "__main__":
    PreTrainedModel.from_pretrained = classmethod(stop)
    sys.exit(run(sys.argv[1], sys.argv[2:]))
