"""Marian's tokenizer: two SentencePiece files and a `vocab.json`."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, MarianTokenizer

from left_trainer.compression import trim_vocabulary
from left_trainer.compression.sentencepiece_trimming import SentencePieceFiles
from tiny import tiny_model
from tokenizer_kinds import corpus, random_texts

pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
DATA = ["the quick brown fox", "größer 東京", ">>deu<< jumps over"]


# The files by hand, as the package sentencepiece need not be installed


def field(number: int, kind: int, value: bytes) -> bytes:
    length = bytes([len(value)]) if kind == 2 else b""
    return bytes([number << 3 | kind]) + length + value


def piece(text: str, score: float, kind: int | None = None) -> bytes:
    content = field(1, 2, text.encode()) + field(2, 5, struct.pack("<f", score))
    return field(1, 2, content + (b"" if kind is None else field(3, 0, bytes([kind]))))


PIECES = {
    "<unk>": (0.0, 2),
    "<s>": (0.0, 3),
    "a": (-1.0, None),
    "b": (-1.5, None),
    "ab": (-2.0, 1),
    "ba": (-2.5, 1),
    "lowest": (-9.0, 1),  # by which unknown characters are scored
    "xa": (-3.0, None),  # x is in no other piece
}
UNIGRAM, BYTE_PAIRS = (field(2, 2, field(3, 0, kind) + field(1, 2, b"corpus.txt")) for kind in (b"\x01", b"\x02"))


def model_of(texts: list[str], trainer: bytes = UNIGRAM) -> bytes:
    return b"".join(piece(text, *PIECES[text]) for text in texts) + trainer


def files(folder: Path, trainer: bytes = UNIGRAM) -> SentencePieceFiles:
    paths = [folder / name for name in ("first", "second")]
    for path in paths:
        path.write_bytes(model_of(list(PIECES), trainer))
    tokens = ["</s>", "<unk>", *(text for text, (_, kind) in PIECES.items() if kind in (1, None)), "<pad>"]
    speller = SimpleNamespace(encode=lambda text, out_type: [text] if text in PIECES else list(text))
    return SentencePieceFiles(
        SimpleNamespace(
            separate_vocabs=False,
            encoder={token: number for number, token in enumerate(tokens)},
            spm_files=paths,
            spm_source=speller,
            spm_target=speller,
            added_tokens_decoder={0: "</s>", 1: "<unk>", len(tokens) - 1: "<pad>"},
            remove_language_code=lambda text: ([], text),
        )
    )


def test_pieces_go_from_the_files(tmp_path):
    made = files(tmp_path)
    needed = sorted(made.needed_ids([], ["ab"]))
    kept = [token for token, number in made.vocabulary.items() if number in needed]
    assert kept == ["</s>", "<unk>", "a", "b", "ab", "lowest", "xa", "<pad>"]
    added = {"added_tokens_decoder": {str(made.vocabulary["<pad>"]): "<pad>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(added))
    made.write(tmp_path, {number: place for place, number in enumerate(needed)})
    for name in ("source.spm", "target.spm"):
        assert (tmp_path / name).read_bytes() == model_of([text for text in PIECES if text != "ba"])
    assert json.loads((tmp_path / "vocab.json").read_text()) == {token: number for number, token in enumerate(kept)}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config == {"added_tokens_decoder": {str(len(kept) - 1): "<pad>"}}


def test_another_kind_of_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not Unigram"):
        files(tmp_path, BYTE_PAIRS)


# With the package


@pytest.fixture(scope="module")
def marian(tmp_path_factory) -> Any:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("marian")
    (folder / "corpus.txt").write_text("\n".join(text.replace("\n", " ") for text in corpus(size=400)))
    tokens = dict.fromkeys(["</s>", "<unk>", ">>deu<<"])
    for name in ("source", "target"):
        options = {"vocab_size": 130, "hard_vocab_limit": False, "minloglevel": 2}
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "corpus.txt"), model_prefix=str(folder / name), **options
        )
        (folder / f"{name}.model").rename(folder / f"{name}.spm")
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{name}.spm"))
        tokens |= dict.fromkeys(map(model.id_to_piece, range(len(model))))
    vocabulary = {token: number for number, token in enumerate([*tokens, "<pad>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    paths = [str(folder / name) for name in ("source.spm", "target.spm", "vocab.json")]
    return MarianTokenizer(*paths, source_lang="en", target_lang="de")


def test_marian_is_trimmed_with_its_model(marian, tmp_path):
    ids = {"pad_token_id": marian.pad_token_id, "eos_token_id": 0, "decoder_start_token_id": marian.pad_token_id}
    model = tiny_model("marian", vocab_size=len(marian), **ids)
    before = copy.deepcopy(model)
    vocabulary = trim_vocabulary(model, marian, DATA)
    smaller, kept = vocabulary.tokenizer, vocabulary.kept_ids
    assert len(smaller) == vocabulary.size_after < len(marian)
    for argument in ("text", "text_target"):
        for text in DATA:
            old, new = (each(**{argument: text}, return_tensors="pt")["input_ids"] for each in (marian, smaller))
            assert [kept[number] for number in new[0]] == old[0].tolist()
            with torch.no_grad():
                expected = before(input_ids=old, decoder_input_ids=old).logits[..., kept]
                torch.testing.assert_close(model(input_ids=new, decoder_input_ids=new).logits, expected)
        for text in random_texts():
            old, new = (each.decode(each(**{argument: text})["input_ids"]) for each in (marian, smaller))
            assert new == old
    smaller.save_pretrained(tmp_path)
    for each in (AutoTokenizer.from_pretrained(tmp_path), copy.deepcopy(smaller)):
        assert each(DATA)["input_ids"] == smaller(DATA)["input_ids"]
