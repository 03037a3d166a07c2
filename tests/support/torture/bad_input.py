"""Bad input to every entry point: one paragraph before weights load, nothing overwritten.

`bad_input.txt` lists the cases that people thought of. The others are made here, from the tables of the arguments and
the registry of methods: a number on the wrong side of each end of its range.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

from left_trainer.argument_ranges import DATA_RANGES, MODEL_RANGES, TRAINING_RANGES
from left_trainer.methods import list_methods
from left_trainer.methods.option_ranges import range_of
from left_trainer.methods.options import known_options
from left_trainer.ranges import ANY, Range
from left_trainer.training_args import LeftTrainingArguments
from processes import ENVIRONMENT
from torture.bad_files import bad_files
from torture.case import Case, python

KIND = "bad_input"
LIST = Path(__file__).with_suffix(".txt")
RUNNER = Path(__file__).with_name("guarded.py")
SEPARATOR = "  =>  "
EXPECTED = "exit 2 and one paragraph with {words}, before weights load and with nothing written"
SECONDS = 120
# One bar of tqdm, which a data set may show before its rows are refused.
PROGRESS = re.compile(r"^.*\d+%\|.*$|^\s*$")
N_QUICK = 12


def cases() -> Iterator[Case]:
    listed = list(listed_cases())
    names = {case.name for case in listed}
    yield from listed
    yield from (case for case in (*argument_cases(), *option_cases()) if case.name not in names)


def listed_cases() -> Iterator[Case]:
    """Those of the file: an entry point with its arguments, an arrow, and words of the message between bars."""
    lines = [line for line in LIST.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    for number, line in enumerate(lines):
        command, words = line.split(SEPARATOR)
        is_quick = number % max(1, len(lines) // N_QUICK) == 0
        yield _case(command.strip(), [word.strip() for word in words.split(" | ")], is_quick)


def argument_cases() -> Iterator[Case]:
    """Each number of the argument classes beyond each end of its range, as a flag of `train`."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(LeftTrainingArguments)}
    for name, allowed in {**TRAINING_RANGES, **MODEL_RANGES, **DATA_RANGES}.items():
        is_integer = "float" not in kinds.get(name, "int")
        for value in _outside(allowed, is_integer):
            yield _case(f"train --output_dir out --{name}={value}", [f"{name}=", "must be"])
        yield _case(f"train --output_dir out --{name}=many", [f"--{name}", "'many' is not"])


def option_cases() -> Iterator[Case]:
    """The numbers of each method's options, beyond one end of their range."""
    for method in list_methods():
        for name, hint in known_options(method).items():
            allowed = range_of(method.config_class, name)
            if hint not in (int, float) or name in method.preset or allowed in (None, ANY):
                continue
            value = _outside(allowed, is_integer=True)[0]
            yield _case(
                f"train --output_dir out --peft_method {method.name} --peft_kwargs {name}={value}",
                [f"peft_method='{method.name}'", f"{name}={value}", "must be"],
            )


def _outside(allowed: Range, is_integer: bool) -> list[float]:
    """Numbers next to the ends of a range, and those that are in none."""
    ends = [end - 1 for end in (allowed.at_least,) if end is not None and end - 1 not in allowed]
    ends += [end + 1 for end in (allowed.at_most,) if end is not None]
    ends += [end for end in (allowed.above, allowed.below) if end is not None]
    if allowed.also:
        ends.append(min(allowed.also) - 1)
    return ends if is_integer else [*ends, math.nan, math.inf]


def _case(command: str, words: list[str], quick: bool = False) -> Case:
    check = functools.partial(check_refused, command, words)
    return Case(KIND, command, EXPECTED.format(words=", ".join(map(repr, words))), check, quick)


def check_refused(command: str, words: list[str], folder: Path) -> None:
    """Run `command` in `folder`; `{files}` in it stands for the folder of `bad_files`."""
    files = bad_files()
    entry, *arguments = [part.replace("{files}", str(files)) for part in shlex.split(command)]
    before = _sizes(folder), _sizes(files)
    result = subprocess.run(
        [python(), str(RUNNER), entry, *arguments],
        cwd=folder,
        env={**ENVIRONMENT, "HOME": str(files)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=SECONDS,
    )
    shown = "\n".join(line for line in result.stderr.splitlines() if not PROGRESS.match(line))
    assert result.returncode == 2, f"exit code {result.returncode}: {shown[-1500:]}"
    assert "Traceback" not in shown, shown[-1500:]
    assert "usage:" not in shown, shown[:300]
    assert shown.count("error: ") == 1, shown[-1500:]
    message = shown[shown.index("error: ") :]
    missing = [word for word in words if word.replace("{files}", str(files)) not in message]
    assert not missing, f"{missing} not in: {message[-1500:]}"
    assert all(line.startswith("Plan: ") for line in result.stdout.splitlines()), result.stdout[-300:]
    assert (_sizes(folder), _sizes(files)) == before, "a file was written"


def _sizes(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
