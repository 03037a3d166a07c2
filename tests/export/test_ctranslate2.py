"""CTranslate2 writes what the trained model writes, for every kind of embedding, start and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tokenizer_kinds
from exports import export, make_base, make_run, marian_tokenizer

pytest.importorskip("ctranslate2")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),
    pytest.mark.filterwarnings("ignore:Model (has|with) (the )?`tie_word_embeddings=True`"),
]
# Model type, tokenizer, and what differs from the tiny config.
CASES = {
    "t5": ("t5", None, {}),
    "t5-sentencepiece": ("t5", tokenizer_kinds.t5, {}),
    "mt5": ("mt5", None, {}),
    "bart": ("bart", None, {"scale_embedding": True}),
    "mbart-languages": ("mbart", tokenizer_kinds.mbart, {"scale_embedding": True}),
    "marian": ("marian", marian_tokenizer, {"scale_embedding": True}),
    "marian-own-table": ("own_table_marian", marian_tokenizer, {}),
    "pegasus": ("pegasus", tokenizer_kinds.pegasus, {}),
    "llama": ("llama", None, {}),
    "llama-tied": ("llama", tokenizer_kinds.llama, {"tie_word_embeddings": True}),
    "llama-narrow-heads": ("llama", None, {"head_dim": 4}),
    "mistral": ("mistral", None, {}),
    "qwen2": ("qwen2", None, {}),
    "gpt2": ("gpt2", None, {}),
    "opt": ("opt", None, {"vocab_size": 304}),
}


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_the_trained_model(case, tmp_path):
    model_type, tokenizer, config = CASES[case]
    if model_type == "own_table_marian":
        config = {"pad_token_id": 299, "decoder_start_token_id": 299, "eos_token_id": 0, "bos_token_id": 1}
    base = make_base(tmp_path / "base", model_type, tokenizer() if tokenizer else None, **config)
    exported = export(make_run(tmp_path / "run", base), "ctranslate2", tmp_path / "out")
    assert exported.verification.rows == 4
    assert exported.verification.holds
    assert exported.precision == "float32"
    assert {"model.bin", "config.json", "tokenizer", "verification.json"} <= {p.name for p in exported.folder.iterdir()}


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_int8_is_smaller_and_says_what_it_changes(model_type, tmp_path):
    base = make_base(tmp_path / "base", model_type)
    run = make_run(tmp_path / "run", base)
    whole = export(run, "ctranslate2", tmp_path / "out")
    small = export(run, "ctranslate2", tmp_path / "int8", precision="int8")
    assert small.precision == "int8"
    sizes = [(each.folder / "model.bin").stat().st_size for each in (small, whole)]
    assert sizes[0] < 0.6 * sizes[1]
    written = json.loads((small.folder / "verification.json").read_text())
    assert written["rows"] == 4
    assert written["equal"] + len(written["differences"]) == 4
    assert all(difference["gap"] >= 0 for difference in written["differences"])


def test_an_export_that_writes_something_else_does_not_appear(tmp_path, monkeypatch):
    """The converter gets the base in place of the merged model."""
    base = make_base(tmp_path / "base", "llama")
    run = make_run(tmp_path / "run", base, size=1.0)

    def copy(path: str, output: Path, *_: object) -> None:
        Path(output).mkdir(parents=True)
        for file in base.iterdir():
            (Path(output) / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr("left_trainer.export.exporting.merge_adapter", copy)
    with pytest.raises(ValueError, match=r"does not write what the model in .* by more than rounding[\s\S]*trained:"):
        export(run, "ctranslate2", tmp_path / "out")
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name and path.suffix != ".lock"]
