"""Texts of models, data and names where they are shown: Markdown, and a terminal. What they contain stays text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

# An underscore inside of a word is none, nor is an ampersand that begins no entity.
MARKDOWN_SPECIAL = re.compile(r"([\\`*\[\]<|~$]|(?<!\w)_|_(?!\w)|&(?=#?\w+;))")
# Beside control characters: ends of lines that some programs know, and marks that turn the direction of what follows.
ALSO_CONTROL = frozenset("\u2028\u2029\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def one_line(text: str) -> str:
    """`text` in one line, with what `printable` writes out."""
    return " ".join(printable(" ".join(text.split())).split())


def markdown(text: str) -> str:
    """`text` in one line of Markdown that shows it as it is."""
    return MARKDOWN_SPECIAL.sub(r"\\\1", one_line(text))


def code(text: str) -> str:
    """`text` as a code span, with as many backticks as it needs. A pipe would end a cell of a table, even there."""
    text = one_line(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    ticks = "`" * (longest + 1)
    space = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table, of cells that are Markdown already."""
    for cells in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(map(_cell, cells))} |"


def code_block(text: str, language: str) -> str:
    """`text` as a block of code, with a fence that it does not contain."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def shorten(text: str, length: int) -> str:
    """`text`, or as much of it as makes `length` characters with an ellipsis."""
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"


def printable(text: str) -> str:
    """`text` for a terminal: control characters but ends of lines are written out, as in `repr`, and cannot act."""
    return "".join(_written_out(character) if _acts(character) else character for character in text)


def _cell(text: str) -> str:
    """A cell. A pipe that has no backslash yet, such as one in a code span, gets one."""
    return re.sub(r"(?<!\\)((?:\\\\)*)\|", r"\1\\|", text)


def _acts(character: str) -> bool:
    return character in ALSO_CONTROL or (character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs"))


def _written_out(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()
