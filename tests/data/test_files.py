"""Files: read under the name that was given, exactly as they are, and refused by file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import os
from pathlib import Path

import datasets
import pyarrow
import pytest
from datasets import Dataset

from left_trainer import DataArguments, get_task, load_task_data
from left_trainer.data.files import read_file, stream_file
from left_trainer.data.paths import find_files

TASK = get_task("summarization")
COLUMNS = {"source": "document", "target": "summary"}
# Names that a pattern, an address, a template or another system's path would read otherwise.
NAMES = (
    "run[1].jsonl",
    "run?.jsonl",
    "run*.jsonl",
    "{a,b}.jsonl",
    "100%.jsonl",
    "a#b.jsonl",
    "zip::a.jsonl",
    "user@host.jsonl",
    "C:\\data\\run.jsonl",
    "~run.jsonl",
    "with space.jsonl",
    "**.jsonl",
    "-.jsonl",
    "$HOME.jsonl",
    "hf:squad.jsonl",
    "naïve.jsonl",
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(number: object) -> dict[str, str]:
    return {"document": f"text {number}", "summary": f"sum {number}"}


def read(name: str, content: str | bytes, **options) -> list[dict]:
    """What is read of a file with this content; the same where it is streamed."""
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    stored = read_file("train_file", name, COLUMNS, **options).to_list()
    assert list(stream_file("train_file", name, COLUMNS, **options)) == stored
    return stored


def refusal(name: str, content: str | bytes, **options) -> str:
    """Why a file with this content is refused; the same where it is streamed."""
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="train_file=") as error:
        read_file("train_file", name, COLUMNS, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# Names


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_taken_literally(name):
    for other in ("run1.jsonl", "runx.jsonl", "a.jsonl", "b.jsonl"):
        Path(other).write_text(lines(row("other")))
    assert read(name, lines(row("own"))) == [{"source": "text own", "target": "sum own"}]
    Path(name).unlink()
    if name == "~run.jsonl":
        return
    with pytest.raises(FileNotFoundError, match="does not exist") as error:
        find_files("train_file", name.replace("*", "").replace("?", "").replace("[1]", "[9]"))
    assert repr(Path.cwd().as_posix()) in str(error.value)


@pytest.mark.parametrize("folder", ["run[1]", "a*", "{x}"])
def test_a_folder_is_taken_literally(folder):
    Path(folder).mkdir()
    Path("run1").mkdir()
    Path("run1/rows.jsonl").write_text(lines(row("other")))
    assert read(f"{folder}/rows.jsonl", lines(row("own")))[0]["source"] == "text own"


def test_a_pattern_is_for_where_there_is_no_such_file(caplog):
    for number in (2, 1):
        Path(f"part-{number}.jsonl").write_text(lines(row(number)))
    with caplog.at_level(logging.WARNING):
        rows = read_file("train_file", "part-[12].jsonl", COLUMNS)
    assert rows["source"][:] == ["text 1", "text 2"]
    assert "matches 2: part-1.jsonl, part-2.jsonl" in caplog.text
    Path("part-2.jsonl").write_text(lines(row(1), {"document": "a"}))
    with pytest.raises(ValueError, match=r"train_file='part-2.jsonl', line 2 has no column 'summary'"):
        read_file("train_file", "part-*.jsonl", COLUMNS)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("rows.json", FileNotFoundError, "does not exist. Did you mean 'rows.jsonl'?"),
        ("none/rows.jsonl", FileNotFoundError, "There is no folder 'none'"),
        ("https://example.org/rows.jsonl", FileNotFoundError, "Only local files are read"),
        ("-", FileNotFoundError, "Standard input"),
        ("folder.jsonl", ValueError, "is a folder"),
        ("pipe.jsonl", ValueError, "is no plain file"),
        ("rows.txt", ValueError, r"ends in '.txt'. Allowed: .jsonl"),
        ("rows.xlsx", ValueError, r"ends in '.xlsx'"),
    ],
)
def test_what_is_no_file_of_rows(name, error, message):
    for file in ("rows.jsonl", "rows.txt", "rows.xlsx"):
        Path(file).write_text(lines(row(1)))
    Path("folder.jsonl").mkdir()
    os.mkfifo("pipe.jsonl")
    with pytest.raises(error) as raised:
        load_task_data(TASK, DataArguments(train_file=name))
    assert message in str(raised.value)
    assert f"train_file={name!r}" in str(raised.value)


# Content


@pytest.mark.parametrize("value", ["NA", "null", "None", "true", "007", "1e5", "2024-01-01", "nan", " 1 ", "1,5", "-"])
def test_text_stays_text(value):
    quoted = f'"{value}"'
    assert read("rows.csv", f"document,summary\n{quoted},{quoted}\n") == [{"source": value, "target": value}]
    assert read("rows.tsv", f"document\tsummary\n{value}\t{value}\n") == [{"source": value, "target": value}]
    assert read("rows.jsonl", lines({"document": value, "summary": value}))[0]["target"] == value
    Dataset.from_list([{"document": value, "summary": value}]).to_parquet("rows.parquet")
    assert read("rows.parquet", Path("rows.parquet").read_bytes())[0]["source"] == value


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_encodings_that_a_mark_tells(encoding, suffix):
    text = "document,summary\nété,Ωμέγα\n" if suffix == ".csv" else '{"document": "été", "summary": "Ωμέγα"}\n'
    assert read(f"rows{suffix}", text.encode(encoding)) == [{"source": "été", "target": "Ωμέγα"}]


def test_encodings_that_are_named():
    content = "document,summary\r\nété,à\r\n".encode("latin-1")
    assert read("rows.csv", content, encoding="latin-1") == [{"source": "été", "target": "à"}]
    assert "line 2 is not UTF-8 text: byte 0xe9" in refusal("rows.csv", content)
    assert "--encoding latin-1" in refusal("rows.csv", content)
    many = "".join(f"text {number},sum\n" for number in range(5000))
    assert "line 5002 is not UTF-8" in refusal("rows.csv", f"document,summary\n{many}é,à\n".encode("latin-1"))
    assert "line 4 is not UTF-16" in refusal("rows.csv", "document,summary\na,b\nc,d\n".encode("utf-16") + b"\x00")
    for name in ("latin-11", "hex"):
        with pytest.raises(ValueError, match=rf"encoding='{name}' is not known"):
            read_file("train_file", "rows.csv", COLUMNS, encoding=name)


@pytest.mark.parametrize(
    "compress", [gzip.compress, bz2.compress, lambda content: pyarrow.compress(content, "zstd", asbytes=True)]
)
def test_compressed_files(compress):
    suffix = {0x1F: ".gz", 0x42: ".bz2", 0x28: ".zst"}[compress(b"a")[0]]
    content = lines(*map(row, range(3))).encode()
    assert len(read(f"rows.jsonl{suffix}", compress(content))) == 3
    assert "cannot be read" in refusal(f"rows.jsonl{suffix}", compress(content)[:-5])
    assert "cannot be read" in refusal(f"plain.jsonl{suffix}", content)


@pytest.mark.parametrize(
    "content",
    [
        lines(row(1), row(2)),
        json.dumps([row(1), row(2)]),
        json.dumps([row(1), row(2)], indent=2),
        json.dumps({"data": [row(1), row(2)]}),
        json.dumps({"version": "1, [x]", "data": [row(1), row(2)]}, indent=1),
        "\n\n" + lines(row(1)) + "\n   \n" + lines(row(2)).rstrip(),
        lines({"document": "text 1", "other": 1, "summary": "sum 1"}, {**row(2), "more": [None, {}]}),
        lines(row(1), row(2)).replace("\n", "\r\n"),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_forms_of_json(content, suffix):
    expected = [{"source": f"text {number}", "target": f"sum {number}"} for number in (1, 2)]
    assert read(f"rows{suffix}", content) == expected


def test_columns_may_be_nested_and_turns_become_lines():
    row = {"document": ["a", "b"], "summary": {"en": "c"}}
    Path("rows.jsonl").write_text(lines(row))
    columns = {"source": "document", "target": "summary.en"}
    assert read_file("train_file", "rows.jsonl", columns).to_list() == [{"source": "a\nb", "target": "c"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines(row(1)) + '{"document": "a", "summ\n' + lines(row(3)), "line 2 is no JSON: Unterminated string"),
        (lines(row(1), row(2)) + '{"document": "a"', "line 3 is no JSON"),
        (lines(row(1)) + "\n" + lines({"document": "a"}), "line 3 has no column 'summary'"),
        (lines(row(1), {"document": None, "summary": "b"}), "line 2 has None as its source"),
        (lines(row(1), {"document": 5, "summary": "b"}), "line 2 has 5 as its source"),
        (lines(row(1), {"document": {"a": 1}, "summary": "b"}), "line 2 has no column 'document'"),
        (lines(row(1), {"document": "a", "summary": ""}), "line 2 has '' as its target"),
        (
            lines(row(1)) + '{"document": "a", "document": "b", "summary": "c"}\n',
            "line 2 is no JSON: it has 'document'",
        ),
        (lines(row(1)) + '"text"\n', "line 2 is a text"),
        (lines(row(1)) + "[1, 2]\n", "line 2 is an array"),
        (lines(row(1)) + '{"document": "\\ud800", "summary": "c"}\n', "line 2 has '\\ud800', which is half"),
        (lines(row(1)) + '{"document": ' + "[" * 100_000 + "\n", "line 2 is nested too deeply"),
        (json.dumps([row(1), {"document": "a"}], indent=1), "line 6 has no column 'summary'"),
        (json.dumps([row(1), 5], indent=1), "line 6 has a number as a row"),
        ('[\n{"document": "a",\n', "line 3 is no JSON"),
        (json.dumps({"a": 1, "b": "c"}, indent=1), "is one object with the keys 'a', 'b'"),
        ("", "has no rows"),
        ("[]", "has no rows"),
        ("\n \n", "has no rows"),
    ],
)
def test_broken_json(content, message):
    assert message in refusal("rows.json", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("document,summary\na,b\nc\n", "line 3 has 1 values for the 2 columns document, summary"),
        ("document,summary\na,b\nc,d,e\n", "line 3 has 3 values"),
        ('document,summary\n"a\nb",c\n"d",\n', "line 4 has '' as its target"),
        ('document,summary\na,b\n"c,d\ne,f\n', "line 3: unexpected end of data"),
        ("document,summary,summary\na,b,c\n", "line 1 names the column 'summary' twice"),
        (
            "documents,summary\na,b\n",
            "Did you mean 'documents'? Present: documents, summary. Name it with --source_column",
        ),
        ("document,summary\n", "has no rows"),
        ("", "has no rows"),
    ],
)
def test_broken_csv(content, message):
    assert message in refusal("rows.csv", content)


def test_quoted_lines_and_long_values():
    long = "x" * 300_000
    assert read("rows.csv", f'document,summary\n"a\r\nb ""c"", d",{long}\n') == [
        {"source": 'a\r\nb "c", d', "target": long}
    ]


def test_a_damaged_parquet_file():
    Dataset.from_list([row(1)]).to_parquet("rows.parquet")
    content = Path("rows.parquet").read_bytes()
    for damaged in (content[:-20], b"", b"no parquet"):
        assert "cannot be read as Parquet" in refusal("rows.parquet", damaged)
    Dataset.from_list([row(1), {"document": "a", "summary": None}]).to_parquet("rows.parquet")
    assert "row 2 has None as its target" in refusal("rows.parquet", Path("rows.parquet").read_bytes())


@pytest.mark.parametrize("bad", [0, 17, 39])
def test_the_line_is_that_of_the_file_whatever_is_used_of_it(bad):
    rows = [{**row(number), "summary": " " if number == bad else "sum"} for number in range(40)]
    Path("rows.jsonl").write_text("\n" + lines(*rows))
    Path("good.jsonl").write_text(lines(row(1), row(2)))
    for use in (
        {"train_file": "rows.jsonl"},
        {"train_file": "rows.jsonl", "max_train_samples": 39},
        {"train_file": "good.jsonl", "validation_file": "rows.jsonl", "max_eval_samples": 40},
        {"train_file": "good.jsonl", "test_file": "rows.jsonl"},
    ):
        with pytest.raises(ValueError, match=rf"_file='rows.jsonl', line {bad + 2} has ' ' as its target"):
            load_task_data(TASK, DataArguments(**use))


# What is stored


def test_what_is_read_once_is_stored_until_the_file_changes(monkeypatch):
    first = read("rows.jsonl", lines(row(1)))
    read_again = read_file("train_file", "rows.jsonl", COLUMNS)
    monkeypatch.setattr("left_trainer.data.files.records", lambda *_: pytest.fail("the file was read again"))
    stored = read_file("train_file", "rows.jsonl", COLUMNS)
    assert stored.to_list() == first
    assert stored.cache_files == read_again.cache_files
    with pytest.raises(BaseException, match="read again"):
        read_file("train_file", "rows.jsonl", COLUMNS, overwrite_cache=True)
    Path("rows.jsonl").write_text(lines(row(1), row(2)))
    with pytest.raises(BaseException, match="read again"):
        read_file("train_file", "rows.jsonl", COLUMNS)


def test_a_file_that_is_refused_leaves_nothing(tmp_path):
    refusal("rows.jsonl", lines(*map(row, range(20_000))) + "{")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
