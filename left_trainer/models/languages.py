"""Tokenizers that mark each text with its language: NLLB, mBART, mBART-50, M2M100, PLBART and relatives."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from left_trainer.models.decoder_inputs import decoder_input_ids
from left_trainer.registry import did_you_mean

ATTRIBUTES = ("src_lang", "tgt_lang", "set_tgt_lang_special_tokens")


def has_languages(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `tokenizer` marks sources and targets with languages that the user chooses."""
    return all(hasattr(tokenizer, name) for name in ATTRIBUTES)


def set_languages(tokenizer: PreTrainedTokenizerBase, source_lang: str | None, target_lang: str | None) -> None:
    """Let `tokenizer` mark sources and targets with these languages; both are `None` where the user named none.

    Raises:
        ValueError: A language of a tokenizer that has none, one without the other, or one that it does not know.
    """
    given = {"source_lang": source_lang, "target_lang": target_lang}
    if not any(given.values()):
        return
    named = next(f"{name}={value!r}" for name, value in given.items() if value)
    if not has_languages(tokenizer):
        raise ValueError(
            f"{named} has no effect: a {type(tokenizer).__name__} does not mark texts with languages. Remove it; name "
            "the languages in the prompt instead."
        )
    if not all(given.values()):
        raise ValueError(f"{named} is given alone. Pass both --source_lang and --target_lang.")
    for name, value in given.items():
        _check_language(tokenizer, str(value), name)
    tokenizer.src_lang, tokenizer.tgt_lang = source_lang, target_lang


def check_languages(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` where `tokenizer` has languages, and those of the texts are not set or not known."""
    if not has_languages(tokenizer):
        return
    languages = {"src_lang": tokenizer.src_lang, "tgt_lang": tokenizer.tgt_lang}
    for name, language in languages.items():
        if language is None:
            first, second = [*_known_languages(tokenizer), "en", "fr"][:2]
            raise ValueError(
                f"processing_class is a {type(tokenizer).__name__}, which marks each text with its language, and its "
                f"{name} is not set. Pass --source_lang {first} --target_lang {second} or the like on the command "
                f"line, or set tokenizer.src_lang = {first!r} and tokenizer.tgt_lang = {second!r} in Python."
            )
        _check_language(tokenizer, language, f"tokenizer.{name}")


def generate_in_target_language(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let `generate` begin as the targets of the training do.

    The language stands first in a target, and is then the first token to generate, or last, and the decoder then starts
    with it (mBART, PLBART).

    Args:
        model: An encoder-decoder model, without an adapter. Its `generation_config` is set.
        tokenizer: One without languages, or without that of the target, changes nothing.
    """
    if not has_languages(tokenizer) or tokenizer.tgt_lang is None:
        return
    labels = torch.tensor([tokenizer(text_target="")["input_ids"]])
    first, language = int(labels[0, 0]), _language_id(tokenizer, labels[0].tolist())
    model.generation_config.decoder_start_token_id = int(decoder_input_ids(model, labels)[0, 0])
    model.generation_config.forced_bos_token_id = first if first == language else None


def _language_id(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int | None:
    """The language among the ids of an empty text."""
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return next((token for token in ids if token not in others), None)


def _known_languages(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    for table in ("lang_code_to_token", "lang_code_to_id"):
        if getattr(tokenizer, table, None):
            return list(getattr(tokenizer, table))
    named = {str(token) for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    return [token for token in tokenizer.all_special_tokens if token not in named]


def _check_language(tokenizer: PreTrainedTokenizerBase, language: str, argument: str) -> None:
    known = _known_languages(tokenizer)
    if language not in known and f"__{language}__" not in known:  # PLBART takes both
        raise ValueError(
            f"{argument}={language!r} is no language of this {type(tokenizer).__name__}."
            f"{did_you_mean(language, known)} It knows {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}."
        )
