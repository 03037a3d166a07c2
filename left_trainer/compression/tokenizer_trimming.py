r"""Taking tokens out of a tokenizer, so that the texts that do not use them are cut into the same tokens as before.

A kept token stays what it was. Three things decide which ones others need:

- **Symbols.** Byte-pair encoding, WordPiece and Unigram spell any text with pieces of one character (a byte of the
  byte-level alphabet, a `##x` of WordPiece). All of these stay, and so does a token with a character that has none: a
  dropped token can always be spelled with what is left, and a text that came back whole from the tokens still does. The
  words of a word-level vocabulary are their own symbols and all stay.
- **Merges.** Byte-pair encoding builds a token by merges, in an order that depends on that token alone: a merge across
  its border would have made another token. Those merges are kept with what they merge. Of the pairs that the trimmed
  model may merge at any point, which are some of those of the whole one, the first in rank is then the same.
- **Scores.** Unigram takes the segmentation with the highest sum of scores. Without pieces that are not in it, it still
  has the highest. Unknown characters score a constant below the lowest score of all, so that the piece with the lowest
  score stays.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
N_BYTES = 256
KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")

Json = dict[str, Any]


def check_trimmable(content: Mapping[str, Any]) -> None:
    """Raise `ValueError` where tokens cannot be taken out of a tokenizer.

    Args:
        content: `tokenizer.json`.
    """
    model = content["model"]
    if model["type"] not in KINDS:
        raise ValueError(f"its model is {model['type']}. Expected one of {', '.join(KINDS)}")
    if model.get("dropout"):
        raise ValueError(
            f"its byte-pair encoding draws segmentations at random (dropout={model['dropout']:g}), which may need any "
            "token. Set tokenizer.backend_tokenizer.model.dropout = None"
        )


def needed_ids(content: Mapping[str, Any], used: Iterable[int]) -> set[int]:
    """Ids of the tokens that have to stay for those in `used` to be found, and for every text to be spelled.

    Args:
        content: `tokenizer.json`.
        used: Ids that texts are made of, or that something names.
    """
    model = content["model"]
    vocabulary = vocabulary_of(model)
    by_id = {number: token for token, number in vocabulary.items()}
    kept = {by_id[number] for number in used if number in by_id} | _symbols_of(model, vocabulary)
    kept |= {token for token in (model.get("unk_token"), _token_of_lowest_score(model)) if token in vocabulary}
    if model["type"] == "BPE":
        kept |= _merged_on_the_way(model, kept)
    ids = {vocabulary[token] for token in kept}
    ids |= {*used, *(token["id"] for token in content["added_tokens"])}
    _map_ids(content, lambda number: ids.add(number) or number)  # type: ignore[func-returns-value]
    return ids


def trimmed(content: Mapping[str, Any], new_ids: Mapping[int, int]) -> Json:
    """`tokenizer.json` with the tokens of `new_ids` alone, under their new ids.

    Args:
        content: Of the whole tokenizer.
        new_ids: By the old ones, which hold all of `needed_ids`. The order of the tokens is the same.
    """
    model = {**content["model"]}
    kept = {token: new_ids[number] for token, number in vocabulary_of(model).items() if number in new_ids}
    if model["type"] == "Unigram":
        model["vocab"] = [piece for number, piece in enumerate(model["vocab"]) if number in new_ids]
        model["unk_id"] = None if model["unk_id"] is None else new_ids[model["unk_id"]]
    else:
        model["vocab"] = dict(sorted(kept.items(), key=lambda item: item[1]))
    if model["type"] == "BPE":
        result = _results_of(model)
        model["merges"] = [
            list(pair)
            for pair in _pairs(model["merges"])
            if pair[0] in kept and pair[1] in kept and result(pair) in kept
        ]
    added = [{**token, "id": new_ids[token["id"]]} for token in content["added_tokens"]]
    changed = {**content, "model": model, "added_tokens": sorted(added, key=lambda token: token["id"])}
    return _map_ids(changed, new_ids.__getitem__)


def vocabulary_of(model: Mapping[str, Any]) -> dict[str, int]:
    """Ids by token, without tokens that were added beside the model's."""
    if model["type"] == "Unigram":
        return {piece: number for number, (piece, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _map_ids(content: Mapping[str, Any], new_id: Callable[[int], int]) -> Json:
    """A copy in which the post-processor and the padding name tokens by their new ids."""
    content = {**content, "post_processor": _map_processor(content.get("post_processor"), new_id)}
    if content.get("padding"):
        content["padding"] = {**content["padding"], "pad_id": new_id(content["padding"]["pad_id"])}
    return content


def _map_processor(processor: Json | None, new_id: Callable[[int], int]) -> Json | None:
    if processor is None:
        return None
    processor = {**processor}
    if "processors" in processor:
        processor["processors"] = [_map_processor(part, new_id) for part in processor["processors"]]
    for name in ("sep", "cls"):  # of BERT and RoBERTa: a token and its id
        if name in processor:
            processor[name] = [processor[name][0], new_id(processor[name][1])]
    if isinstance(processor.get("special_tokens"), dict):  # of a template
        processor["special_tokens"] = {
            name: {**token, "ids": [new_id(number) for number in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
    return processor


# Symbols


def _symbols_of(model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> set[str]:
    """Tokens of one symbol, and those with a symbol that is no token."""
    symbols = _speller(model)
    bytes_ = {token for token in vocabulary if BYTE_TOKEN.fullmatch(token)}
    spells_all = bool(model.get("byte_fallback")) and len(bytes_) == N_BYTES
    kept = set(bytes_)
    for token in vocabulary:
        parts = symbols(token)
        if len(parts) == 1 or not (spells_all or all(part in vocabulary for part in parts)):
            kept.add(token)
    return kept


def _speller(model: Mapping[str, Any]) -> Callable[[str], list[str]]:
    """A function from a token to the symbols that it is made of."""
    if model["type"] == "WordLevel":
        return lambda token: [token]
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""

    def symbols(token: str) -> list[str]:
        continues = bool(prefix) and token.startswith(prefix) and token != prefix
        ends = bool(suffix) and token.endswith(suffix) and token != suffix
        inner = token[len(prefix) if continues else 0 : len(token) - len(suffix) if ends else len(token)]
        parts = [(prefix if place or continues else "") + character for place, character in enumerate(inner)]
        return [*parts[:-1], parts[-1] + (suffix if ends else "")] if parts else [token]

    return symbols


def _token_of_lowest_score(model: Mapping[str, Any]) -> str | None:
    if model["type"] != "Unigram":
        return None
    token: str = min(model["vocab"], key=lambda piece: piece[1])[0]
    return token


# Merges


def _pairs(merges: Sequence[Any]) -> list[tuple[str, str]]:
    """Older files have a merge in one string."""
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]  # type: ignore[misc]


def _results_of(model: Mapping[str, Any]) -> Callable[[tuple[str, str]], str]:
    prefix = model.get("continuing_subword_prefix") or ""
    return lambda pair: pair[0] + pair[1].removeprefix(prefix)


def _merged_on_the_way(model: Mapping[str, Any], tokens: Iterable[str]) -> set[str]:
    """What byte-pair encoding makes on its way to each of `tokens`."""
    ranks = {pair: rank for rank, pair in enumerate(_pairs(model["merges"]))}
    symbols, result = _speller(model), _results_of(model)
    made: set[str] = set()
    for token in tokens:
        parts = symbols(token)
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(range(len(pairs)), key=lambda place: ranks.get(pairs[place], len(ranks)))
            if pairs[best] not in ranks:
                break
            parts[best : best + 2] = [result(pairs[best])]
            made.add(parts[best])
    return made


def as_json(backend: Any) -> Json:
    """`tokenizer.json` of a tokenizer of the `tokenizers` library."""
    content: Json = json.loads(backend.to_str())
    return content
