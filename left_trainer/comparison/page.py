"""The page of a comparison: one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from left_trainer.adapters.text_files import write_whole
from left_trainer.runs.json_records import to_json

SCRIPTS = ("elements.js", "charts.js", "run.js", "page.js")


def write_page(summary: Mapping[str, Any], path: Path) -> None:
    """Write the page of a comparison: tables, charts and samples in one HTML file that loads nothing.

    The page carries a content security policy that names its own style and script by their hashes, so a browser loads
    nothing else and runs nothing that came with the data.

    Args:
        summary: As `Summary.to_json` returns it. Numbers that are not finite become null, which JSON has instead.
        path: The file to write.
    """
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


def _read(name: str) -> str:
    return (files("left_trainer.comparison") / "web" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embed(summary: Mapping[str, Any]) -> str:
    """JSON that can stand inside of a script element: without `<` nothing in it ends or opens one."""
    return json.dumps(to_json(summary), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
