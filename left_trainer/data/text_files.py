"""Text in a file: its encoding, its lines, and the line at which it cannot be read."""

from __future__ import annotations

import codecs
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from left_trainer.data.paths import COMPRESSED, find_files, named

BLOCK_BYTES = 2**16
# Longer ones first: the mark of UTF-32 starts with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


def read_lines(argument: str, name: str, encoding: str | None = None) -> list[str]:
    """The lines of the file, or the files, of that name, without their ends; arguments as in `open_text`."""
    lines = []
    for file in find_files(argument, name):
        with open_text(argument, file, encoding) as text:
            lines += [line.rstrip("\n") for line in text]
    return lines


@contextlib.contextmanager
def open_text(
    argument: str,
    file: Path,
    encoding: str | None = None,
    newline: str | None = None,
    fix: str = "Convert the file to UTF-8.",
) -> Iterator[TextIO]:
    """The text of a file that may be compressed.

    Args:
        argument: That names the file, for errors.
        file: From `find_files`.
        encoding: By default that of the mark at its start, and UTF-8 where there is none.
        newline: As in `open`.
        fix: What to do about text in another encoding, for errors.

    Raises:
        ValueError: Text in another encoding, an encoding that does not exist, or a damaged compressed file.
    """
    given = named(argument, file)
    with _open_bytes(file) as stream:
        try:
            encoding = encoding or _marked_encoding(file)
            text = io.TextIOWrapper(stream, encoding=encoding, newline=newline)
        except LookupError as error:
            raise ValueError(
                f"encoding={encoding!r} is not known. Pass one that Python knows: utf-8, utf-16, latin-1, cp1252, ..."
            ) from error
        except OSError as error:
            raise _damaged(given, error) from error
        try:
            yield text
        except UnicodeError as error:
            raise ValueError(
                f"{given}, line {_bad_line(file, encoding)} is not {encoding.upper()} text: {_reason(error)}. {fix}"
            ) from error
        except (OSError, EOFError) as error:
            raise _damaged(given, error) from error


def _damaged(given: str, error: BaseException) -> ValueError:
    return ValueError(f"{given} cannot be read: {error}. Check that it is whole, and compressed as its name says.")


def _reason(error: UnicodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x}, {error.reason}"
    return str(error)


def _open_bytes(file: Path) -> BinaryIO:
    codec = COMPRESSED.get(file.suffix.lower())
    if codec is None:
        return file.open("rb")
    import pyarrow

    return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(file), compression=codec)))


def _marked_encoding(file: Path) -> str:
    with _open_bytes(file) as stream:
        start = stream.read(4)
    return next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")


def _bad_line(file: Path, encoding: str) -> int:
    """Number of the first line that is not in `encoding`, counted from 1."""
    decoder, line = codecs.getincrementaldecoder(encoding)(), 1
    with _open_bytes(file) as stream:
        try:
            while block := stream.read(BLOCK_BYTES):
                line += decoder.decode(block).count("\n")
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].decode(encoding, "ignore").count("\n")
    return line
