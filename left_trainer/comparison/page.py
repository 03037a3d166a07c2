"""The page of a comparison: an HTML file, and beside it the samples of each row, loaded when they are opened."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from left_trainer.adapters.text_files import write_whole
from left_trainer.runs.json_records import to_json

SAMPLES = "samples"
MAX_POINTS = 60  # of a curve
SCRIPTS = ("elements.js", "charts.js", "run.js", "page.js")


def write_page(summary: Mapping[str, Any], path: Path) -> None:
    """Write the page of a comparison: tables and charts, which load nothing but the samples that a reader opens.

    These are scripts, `samples/ID.js`, since a page that is opened as a file may load nothing else. The page carries a
    content security policy that names its own style and script by their hashes and allows scripts beside it, so a
    browser loads nothing from elsewhere and runs nothing that came with the data.

    Args:
        summary: As `Summary.to_json` returns it. Numbers that are not finite become null, which JSON has instead.
        path: The file to write.
    """
    rows = [{**row, "curves": [_thinned(curve) for curve in row["curves"]]} for row in summary["rows"]]
    write_samples(rows, path.parent / SAMPLES)
    rows = [{**row, "samples": _file_name(row) if row["samples"] else ""} for row in rows]
    summary = {**summary, "rows": rows}
    style = _read("page.css")
    script = '"use strict";\n' + "".join(_read(name) for name in SCRIPTS)
    parts = {
        "title": html.escape(str(summary["title"])),
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
        "data": _embed(summary),
    }
    # One pass, so that what is filled in is not searched for places to fill.
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _read("page.html"))
    write_whole(path, page)


def write_samples(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write the samples of each row into a file of `folder`. Files that are as they should be are left alone."""
    wanted = {_file_name(row): f"showSamples({_embed(row['samples'])})\n" for row in rows if row["samples"]}
    if wanted:
        folder.mkdir(exist_ok=True)
    for name, text in wanted.items():
        file = folder / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            write_whole(file, text)
    for file in folder.glob("*.js"):
        if file.name not in wanted:
            file.unlink()


def _file_name(row: Mapping[str, Any]) -> str:
    return f"{hashlib.sha256(row['id'].encode()).hexdigest()[:16]}.js"


def _thinned(curve: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    """Points enough for what a chart can show, the last one always, with as many digits."""
    stride = -(-len(curve) // MAX_POINTS) or 1
    kept = [*curve[:-1:stride], *curve[-1:]]
    return [[step, loss and float(f"{loss:.4g}")] for step, loss in kept]


def _read(name: str) -> str:
    return (files("left_trainer.comparison") / "web" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embed(value: Any) -> str:
    """JSON that can stand inside of a script element: without `<` nothing in it ends or opens one."""
    return json.dumps(to_json(value), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
