"""What models, data and names contain stays text where it is shown: cards, tables, plots, terminals."""

from __future__ import annotations

import pytest
import yaml
from huggingface_hub import ModelCard

from left_trainer import LeftTrainingArguments, get_method
from left_trainer.shown_text import code, code_block, markdown, one_line, printable, table_lines
from left_trainer.trainer.model_card import build_model_card

HOSTILE = [
    "a|b", "a\\|b", "`code`", "``", "`", "<b>x</b>", "two\nlines", "a\r\nb", "x\u2028y\u0085z", "$x_1$", "*b* _i_",
    "[t](javascript:1)", "&lt;", "---", "\n---\nlicense: mit\n---\n", "\x1b[31mred\x07", "{% raw %}", "\\", "a\\", "",
    "```\nx", "😀 ü | ñ", "!!python/object:x", "'; DROP", "# title", "key: value", "- x", "\u202eevil",
]  # fmt: skip


def cells_of(line: str) -> list[str]:
    """The cells of a line of a Markdown table, as GitHub reads one: a pipe with a backslash ends none."""
    cells, escaped = [""], False
    for character in line:
        if character == "|" and not escaped:
            cells.append("")
        else:
            cells[-1] += character
        escaped = character == "\\" and not escaped
    return cells[1:-1]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("show", [markdown, code])
def test_a_text_stays_in_its_cell(text, show):
    lines = list(table_lines(["a", "b"], [[show(text), "end"]]))
    assert len(lines) == 3
    assert not any(character in lines[2] for character in "\n\r\x1b\u2028\u0085\u202e")
    assert [len(cells_of(line)) for line in lines] == [2, 2, 2]
    assert cells_of(lines[2])[1].strip() == "end"


def test_markdown_shows_common_names_as_they_are():
    for text in ("prefix_tuning", "lora (r: 8)", "google/flan-t5-base", "1.2 ± 0.3", "100 %", "a & b", "rouge1"):
        assert markdown(text) == text


def test_markdown_is_no_markup():
    assert markdown("*a* [b](c) <i> `d` $e$ _f_ &amp; |") == r"\*a\* \[b\](c) \<i> \`d\` \$e\$ \_f\_ \&amp; \|"


@pytest.mark.parametrize("text", HOSTILE)
def test_code_ends_where_its_text_does(text):
    shown, block = code(text), code_block(text, "python")
    ticks = len(shown) - len(shown.lstrip("`"))
    assert "`" * ticks not in shown[ticks:-ticks].replace(" ", "") or ticks == 1
    fence = block.partition("python")[0]
    assert block.split("\n")[-1] == fence
    assert fence not in block[len(fence) : -len(fence)]


def test_a_terminal_gets_no_commands():
    assert printable("a\tb\nc\x1b[2J\x07\x9b\u202e\ud800") == "a\tb\nc\\x1b[2J\\x07\\x9b\\u202e\\ud800"
    assert printable("👩‍🚀 ولد 漢字 é") == "👩‍🚀 ولد 漢字 é"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_card_is_read_as_it_was_written(text, tmp_path):
    args = LeftTrainingArguments(output_dir=str(tmp_path), report_to="none", learning_rate=1e-3)
    card = build_model_card(
        model_name=text or "x", base_model=text or "x", family="decoder_only", method=get_method("lora"), args=args,
        log_history=[{"step": 1, "eval_loss": 1.0, f"eval_{text}": 2.0}], tags=[text], datasets=[text], data=text,
        license=text, language=text,
    )  # fmt: skip
    card.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    front = (tmp_path / "README.md").read_text(encoding="utf-8").split("\n---\n")[0].removeprefix("---\n")
    metadata = yaml.safe_load(front)
    assert metadata["library_name"] == "peft"
    assert read.data.to_dict()["tags"] == metadata["tags"]
    assert read.data.to_dict().get("license") in (one_line(text), text, None)
    titles = [line for line in read.text.split("\n") if line.startswith("# ")]
    assert len(titles) == 1
    assert metadata.get("base_model") in ("x", None)  # the hub refuses what cannot be a name
