"""A model and its tokenizer with only the tokens that some texts need."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from left_trainer.adapters.base_model import mark_changed
from left_trainer.compression.tokenizer_trimming import as_json, check_trimmable, needed_ids, trimmed
from left_trainer.compression.vocabulary_tables import (
    check_model,
    check_positions,
    configs_of,
    keep_rows,
    named_ids,
    tables_of,
)
from left_trainer.data.encoding import token_ids
from left_trainer.models.languages import has_languages

TEXTS_AT_ONCE = 1024
# What a tokenizer is set to after it was loaded, and does not save.
SETTINGS = (
    "padding_side",
    "truncation_side",
    "model_max_length",
    "clean_up_tokenization_spaces",
    "split_special_tokens",
    "chat_template",
    "name_or_path",
)


@dataclass(frozen=True)
class TrimmedVocabulary:
    """What is left of a vocabulary.

    Args:
        tokenizer: With the kept tokens alone.
        kept_ids: Their ids in the whole vocabulary; the place in the list is the new id. Those that a config names and
            that are no token of the tokenizer come last.
        size_before: Tokens, with the rows of the model's table that are none; without a model those of the tokenizer.
        saved_bytes: Of the model's tables.
    """

    tokenizer: PreTrainedTokenizerBase
    kept_ids: Sequence[int]
    size_before: int
    saved_bytes: int = 0

    @property
    def size_after(self) -> int:
        """Tokens that are left, and rows of the model's tables."""
        return len(self.kept_ids)

    @property
    def new_ids(self) -> dict[int, int]:
        """New ids by those in the whole vocabulary."""
        return {number: place for place, number in enumerate(self.kept_ids)}

    def size_in(self, rows: int) -> int:
        """Tokens that are left of a table of so many rows: ids that a config names by default may be beyond it."""
        return sum(number < rows for number in self.kept_ids)

    def __str__(self) -> str:
        saved = f"{self.saved_bytes / 2**20:,.1f} MiB less"
        return f"Vocabulary: {self.size_before:,} -> {self.size_after:,} tokens, {saved}"


def trim_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> TrimmedVocabulary:
    """Leave a model and a tokenizer only the tokens that `texts`, special tokens and single characters need.

    The trimmed tokenizer cuts `texts` into the same tokens as before, and any other text into tokens from which it
    comes back as it did. The kept tokens have their embeddings, bit for bit; the others no longer exist, so that they
    are never generated.

    Args:
        model: Is changed: input embeddings of encoder and decoder, output head, its bias, and its configs.
        tokenizer: Is not changed.
        texts: That the model will read or write.

    Returns:
        The trimmed tokenizer, and the ids that were kept.

    Raises:
        ValueError: The tokenizer or the model cannot be trimmed, for the reason given; neither was changed.
    """
    check_model(model)
    vocabulary = trim_tokenizer(tokenizer, texts, named_ids(*configs_of(model)))
    return trim_model(model, vocabulary)


def trim_tokenizer(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], needed: Iterable[int] = ()
) -> TrimmedVocabulary:
    """A tokenizer with only the tokens that `texts`, special tokens, single characters and `needed` need.

    Args:
        tokenizer: Is not changed.
        texts: Is read twice, if it is not an iterator.
        needed: Further ids; those of no token keep their row in the model.

    Raises:
        ValueError: It cannot be trimmed, for the reason given.
    """
    texts = list(texts) if isinstance(texts, Iterator) else texts
    known = tokenizer.get_vocab()
    try:
        content = _content_of(tokenizer)
        used = _used_ids(tokenizer, texts) | {*tokenizer.all_special_ids, *needed}
        numbers = needed_ids(content, used)
        tokens = sorted(set(known.values()) & numbers)
        kept = [*tokens, *sorted(numbers - {*tokens})]
        vocabulary = TrimmedVocabulary(tokenizer, kept, len(known))
        smaller = _rebuilt(tokenizer, trimmed(content, vocabulary.new_ids))
        _check_same(tokenizer, smaller, vocabulary, texts)
    except ValueError as error:
        raise ValueError(
            f"The vocabulary of this {type(tokenizer).__name__} cannot be trimmed: {error}. Remove vocabulary=data "
            "from shrink_to, or pass another tokenizer of the same vocabulary."
        ) from error
    return dataclasses.replace(vocabulary, tokenizer=smaller)


def trim_model(model: PreTrainedModel, vocabulary: TrimmedVocabulary) -> TrimmedVocabulary:
    """Leave `model` the rows of the tokens that are kept.

    Args:
        model: Is changed.
        vocabulary: Of its tokenizer.

    Returns:
        `vocabulary` with the size of the model.

    Raises:
        ValueError: The model cannot be trimmed, for the reason given; it was not changed.
    """
    check_model(model)
    try:
        tables = tables_of(model)
        rows = min(table.rows for table in tables)
        n_tokens = len(vocabulary.tokenizer)
        tokens, others = vocabulary.kept_ids[:n_tokens], vocabulary.kept_ids[n_tokens:]
        if max(tokens) >= rows:
            raise ValueError(f"it has {rows} rows for tokens, and the tokenizer a token with the id {max(tokens)}")
        # Some configs have ids by default that no table has a row for.
        kept = [*tokens, *(number for number in others if number < rows)]
        unknown = sorted(named_ids(*configs_of(model)) & {*range(rows)} - {*kept})
        if unknown:
            raise ValueError(f"its configs name the tokens {unknown}, which were not kept")
        check_positions(model, tables, vocabulary.new_ids)
    except ValueError as error:
        raise ValueError(
            f"The vocabulary of this {type(model).__name__} cannot be trimmed: {error}. Remove vocabulary=data from "
            "shrink_to."
        ) from error
    mark_changed(model)
    before = sum(table.tensor.nbytes for table in tables)
    size = max(table.rows for table in tables)
    keep_rows(model, tables, kept)
    saved = before - sum(table.tensor.nbytes for table in tables)
    return dataclasses.replace(vocabulary, kept_ids=kept, size_before=size, saved_bytes=saved)


def _content_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise ValueError("it is not one of the tokenizers library, which keeps all it does in tokenizer.json")
    content = as_json(backend)
    check_trimmable(content)
    return content


def _used_ids(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> set[int]:
    """Ids of the tokens of `texts`, and of the chat template's own words."""
    used: set[int] = set()
    for batch in _batches(texts):
        for argument in _arguments(tokenizer):
            used.update(*token_ids(tokenizer, batch, argument))
    template = tokenizer.chat_template
    for source in template.values() if isinstance(template, dict) else [template or ""]:
        words = [part.value for part in jinja2.Environment().lexer.tokenize(source) if part.type in ("data", "string")]
        used.update(*token_ids(tokenizer, [word for word in words if word]))
    return used


def _rebuilt(tokenizer: PreTrainedTokenizerBase, content: dict[str, Any]) -> PreTrainedTokenizerBase:
    """`tokenizer` as it will be when it was saved and loaded, with another `tokenizer.json`."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        rebuilt = type(tokenizer).from_pretrained(folder)
    for name in SETTINGS:
        if getattr(rebuilt, name, None) != getattr(tokenizer, name, None):
            setattr(rebuilt, name, getattr(tokenizer, name))
    return rebuilt


def _check_same(
    tokenizer: PreTrainedTokenizerBase,
    smaller: PreTrainedTokenizerBase,
    vocabulary: TrimmedVocabulary,
    texts: Iterable[str],
) -> None:
    """Raise `ValueError` where `smaller` has other ids than were meant, or cuts one of `texts` in another way."""
    new_ids = vocabulary.new_ids
    known = tokenizer.get_vocab()
    meant = {token: new_ids[number] for token, number in known.items() if number in new_ids}
    if smaller.get_vocab() != meant:
        wrong = next(iter(meant.items() ^ smaller.get_vocab().items()))
        raise ValueError(f"its class gives other ids to the tokens of a smaller vocabulary ({wrong[0]!r})")
    if smaller.special_tokens_map != tokenizer.special_tokens_map:
        raise ValueError("its class sets other special tokens when it is loaded")
    for batch in _batches(texts):
        for argument in _arguments(tokenizer):
            before, after = (token_ids(each, batch, argument) for each in (tokenizer, smaller))
            for text, old, new in zip(batch, before, after, strict=True):
                if [new_ids[number] for number in old] != new:
                    raise ValueError(f"{text[:40]!r} would be cut into other tokens")


def _arguments(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    return ("text", "text_target") if has_languages(tokenizer) and tokenizer.tgt_lang else ("text",)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(texts)
    while batch := list(islice(remaining, TEXTS_AT_ONCE)):
        yield batch
