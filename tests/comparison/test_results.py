"""What a comparison reads back: its own files, whatever texts they hold, and damaged ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from left_trainer.comparison.cell import CELL_FILE, FAILURE_FILE, Cell
from left_trainer.comparison.general_text import general_rows
from left_trainer.comparison.results import CELLS, RESULTS_FILE, Result, read_cells, read_results, write_results
from left_trainer.runs.report import REPORT_FILE

CONDITIONS = {"base_model": "m", "prompt": "{source}", "data_sha256": "0", "max_new_tokens": 1, "num_beams": 1}
CELL = Cell("method", "summarization", {"seed": 42, "peft_method": "lora"}, CONDITIONS)
# Characters at which `str.splitlines` ends a line and JSON does not.
ENDS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r", "\r\n", "\n"]
DAMAGES = {
    "empty": b"", "cut off": b'{"kind": "me', "list": b"[]", "null": b"null", "number": b"3", "text": b'"x"',
    "foreign": b'{"a": 1}', "binary": b"\xff\xfe\x00", "zeros": b"\0" * 64, "deep": b"[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_results_may_hold_any_text(end, tmp_path):
    results = [Result(CELL, None, f"a{end}b"), Result(replace(CELL, general_text_file=f"c{end}d"), None, "e")]
    write_results(results, tmp_path)
    assert read_results(tmp_path) == results


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_general_text_may_hold_any_text(end, tmp_path):
    text = " ".join(map(str, range(20)))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"{text}{end}{text}"}, ensure_ascii=False) + "\n")
    assert len(general_rows(str(tmp_path / "a.jsonl"))) == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_named(damage, tmp_path):
    write_results([Result(CELL, None, "a")], tmp_path)
    with (tmp_path / RESULTS_FILE).open("ab") as file:
        file.write(DAMAGES[damage] + b"\n")
    if damage == "empty":
        assert len(read_results(tmp_path)) == 1
        return
    with pytest.raises(ValueError, match=RESULTS_FILE):
        read_results(tmp_path)


def write_cell(folder: Path, seed: int) -> Path:
    cell = replace(CELL, arguments={**CELL.arguments, "seed": seed})
    folder = folder / CELLS / cell.name
    folder.mkdir(parents=True)
    cell.write(folder)
    (folder / FAILURE_FILE).write_text('{"reason": "it failed"}')
    return folder


@pytest.mark.parametrize("name", [CELL_FILE, REPORT_FILE, FAILURE_FILE])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cell_is_named_and_the_others_stay(damage, name, tmp_path, caplog):
    damaged, whole = write_cell(tmp_path, 42), write_cell(tmp_path, 43)
    (damaged / name).write_bytes(DAMAGES[damage])
    assert list(read_cells(tmp_path)) == [whole.name]
    (message,) = caplog.messages
    assert repr(str(damaged / name)) in message
    assert "is done again" in message


@pytest.mark.parametrize(
    "field", ["conditions.base_model", "conditions.prompt", "conditions.num_beams", "arguments.seed", "task"]
)
def test_a_cell_that_cannot_be_shown_is_damaged(field, tmp_path, caplog):
    folder = write_cell(tmp_path, 42)
    content = json.loads((folder / CELL_FILE).read_text())
    part, _, key = field.partition(".")
    content.update({part: {**content[part], key: ["x"]}} if key else {part: "x"})
    (folder / CELL_FILE).write_text(json.dumps(content))
    assert read_cells(tmp_path) == {}
    assert repr(str(folder / CELL_FILE)) in caplog.text
