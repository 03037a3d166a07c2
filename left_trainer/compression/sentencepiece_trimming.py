"""Taking tokens out of a tokenizer of SentencePiece files and a `vocab.json`: Marian's.

`source.spm` and `target.spm` cut texts into pieces, and `vocab.json` numbers them. Both lose pieces, by the rules of
`tokenizer_trimming`. The files are protocol buffers, of which only the list of pieces is read and written here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

VOCAB_FILE, CONFIG_FILE = "vocab.json", "tokenizer_config.json"
MODEL_FILES = ("source.spm", "target.spm")
# Numbers of fields in sentencepiece_model.proto, and of the kinds that matter.
PIECE, TRAINER = 1, 2
TEXT, SCORE, KIND = 1, 2, 3
MODEL_TYPE, UNIGRAM = 3, 1
NORMAL = 1
VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5


class Piece(NamedTuple):
    """An entry of a model. A kind other than `NORMAL` is no text's."""

    text: str
    score: float
    kind: int


class SentencePieceFiles:
    """The files that such a tokenizer is saved as.

    Args:
        tokenizer: With `spm_files` and `encoder`.

    Raises:
        ValueError: It has two vocabularies, or models that are not Unigram.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.separate_vocabs:
            raise ValueError("source and target have vocabularies of their own, and ids of a batch are of both")
        self.tokenizer = tokenizer
        self.vocabulary: dict[str, int] = dict(tokenizer.encoder)
        self.models = [Path(file).read_bytes() for file in tokenizer.spm_files]
        if any(_model_type(content) != UNIGRAM for content in self.models):
            raise ValueError("its SentencePiece models are not Unigram")
        self.pieces = [_pieces(content) for content in self.models]
        self.kept_pieces: set[str] = set()

    def needed_ids(self, used: Iterable[int], texts: Iterable[str]) -> set[int]:
        """Ids that have to stay. Pieces of `texts` that have no id stay in the models."""
        ids = {*used, *self.tokenizer.added_tokens_decoder}
        kept = {token for token, number in self.vocabulary.items() if number in ids or _is_language(token)}
        for text in texts:
            _, text = self.tokenizer.remove_language_code(text)
            for model in (self.tokenizer.spm_source, self.tokenizer.spm_target):
                kept.update(model.encode(text, out_type=str))
        for pieces in self.pieces:
            known = {piece.text for piece in pieces} & self.vocabulary.keys()
            normal = [piece for piece in pieces if piece.kind == NORMAL]
            kept |= {piece.text for piece in normal if len(piece.text) == 1 or not known.issuperset(piece.text)}
            kept |= {min(normal, key=lambda piece: piece.score).text} if normal else set()
        self.kept_pieces = kept
        return ids | {self.vocabulary[token] for token in kept if token in self.vocabulary}

    def write(self, folder: Path, new_ids: Mapping[int, int]) -> None:
        """Write the files over those of the whole tokenizer."""
        for name, content in zip(MODEL_FILES, self.models, strict=True):
            (folder / name).write_bytes(_without(content, self.kept_pieces))
        vocabulary = {token: new_ids[number] for token, number in self.vocabulary.items() if number in new_ids}
        ordered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
        (folder / VOCAB_FILE).write_text(json.dumps(ordered, ensure_ascii=False, indent=2), encoding="utf-8")
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        added = config.get("added_tokens_decoder", {})
        config["added_tokens_decoder"] = {str(new_ids[int(number)]): token for number, token in added.items()}
        (folder / CONFIG_FILE).write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")


def _is_language(token: str) -> bool:
    return token.startswith(">>") and token.endswith("<<")


def _pieces(content: bytes) -> list[Piece]:
    pieces = []
    for number, _, value in _fields(content):
        if number == PIECE:
            found = {name: inner for name, _, inner in _fields(value)}
            score = struct.unpack("<f", found[SCORE])[0] if SCORE in found else 0.0
            pieces.append(Piece(found[TEXT].decode(), score, found.get(KIND, NORMAL)))
    return pieces


def _model_type(content: bytes) -> int:
    specs = [value for number, _, value in _fields(content) if number == TRAINER]
    return next((value for spec in specs for number, _, value in _fields(spec) if number == MODEL_TYPE), UNIGRAM)


def _without(content: bytes, kept: set[str]) -> bytes:
    """A model without the normal pieces that are not in `kept`."""
    pieces, parts = iter(_pieces(content)), []
    for number, raw, _ in _fields(content):
        piece = next(pieces) if number == PIECE else None
        if piece is None or piece.kind != NORMAL or piece.text in kept:
            parts.append(raw)
    return b"".join(parts)


def _fields(content: bytes) -> Iterator[tuple[int, bytes, Any]]:
    """Number, bytes and value of each field of a protocol buffer: an integer, or bytes."""
    place = 0
    while place < len(content):
        start = place
        tag, place = _varint(content, place)
        kind = tag & 7
        value: int | bytes
        if kind == VARINT:
            value, place = _varint(content, place)
        else:
            length, place = {EIGHT_BYTES: (8, place), FOUR_BYTES: (4, place)}.get(kind) or _varint(content, place)
            value, place = content[place : place + length], place + length
        yield tag >> 3, content[start:place], value


def _varint(content: bytes, place: int) -> tuple[int, int]:
    """An integer in groups of seven bits, and the place after it."""
    value = shift = 0
    while True:
        byte = content[place]
        value, shift, place = value | (byte & 0x7F) << shift, shift + 7, place + 1
        if byte < 0x80:
            return value, place
