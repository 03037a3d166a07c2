"""The tokenizer of a decoder-only model in GGUF: byte-level pairs as of GPT-2, or pairs of a SentencePiece model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How texts are split before pairs are merged, by the names that llama.cpp has for it.
SPLITS = {GPT2_PATTERN: "gpt-2", rf"{WORDS}\p{{N}}{{1,3}}{REST}": "llama-bpe", rf"{WORDS}\p{{N}}{REST}": "qwen2"}
BYTES = tuple(f"<0x{number:02X}>" for number in range(256))
# llama.cpp's own numbers of kinds of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True)
class GgufTokenizer:
    """What GGUF says of a tokenizer.

    Args:
        model: `gpt2` or `llama`.
        split: Name of the rule that texts are split by; `None` for `llama`.
        tokens: By id, as many as the model has embeddings.
        kinds: Of each token.
        merges: Pairs in their order, for `gpt2`.
        scores: Of each token, for `llama`: pairs of a higher one are merged first.
        space_first: Whether a text gets a space in front, for `llama`.
    """

    model: str
    split: str | None
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    space_first: bool = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, size: int) -> GgufTokenizer:
        """The tokenizer of a model with `size` embeddings.

        Raises:
            ValueError: llama.cpp has no tokenizer that gives the same tokens.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"a {type(tokenizer).__name__} has no tokenizer.json")
        state = json.loads(backend.to_str())
        model = state["model"]
        if model["type"] != "BPE":
            raise ValueError(f"its tokenizer is a {model['type']} one, which llama.cpp has for encoder-decoder models")
        tokens = _tokens(tokenizer, size)
        kinds = _kinds(tokenizer, tokens)
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        if model.get("byte_fallback"):
            ranks: dict[str, int] = {}
            for rank, pair in enumerate(pairs):
                ranks.setdefault(pair.replace(" ", ""), rank)
            scores = tuple(float(-ranks.get(token, len(pairs))) for token in tokens)
            return cls("llama", None, tokens, kinds, scores=scores, space_first=_puts_space_first(tokenizer))
        return cls("gpt2", _split(state), tokens, kinds, merges=tuple(pairs))

    def write(self, writer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Put everything into `writer`, a `gguf.GGUFWriter`, with what `tokenizer` says of special tokens."""
        writer.add_tokenizer_model(self.model)
        if self.split is not None:
            writer.add_tokenizer_pre(self.split)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.kinds))
        if self.merges:
            writer.add_token_merges(list(self.merges))
        if self.scores:
            writer.add_token_scores(list(self.scores))
            writer.add_add_space_prefix(self.space_first)
        for name in ("bos", "eos", "unk", "pad"):
            token = getattr(tokenizer, f"{name}_token_id")
            if token is not None:
                getattr(writer, f"add_{name}_token_id")(token)
        ids = tokenizer("a")["input_ids"]
        writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
        writer.add_add_eos_token(False)
        if getattr(tokenizer, "chat_template", None):
            writer.add_chat_template(tokenizer.chat_template)


def _tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[str, ...]:
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    return tuple(by_id.get(number, f"[PAD{number}]") for number in range(size))


def _kinds(tokenizer: PreTrainedTokenizerBase, tokens: tuple[str, ...]) -> tuple[int, ...]:
    known, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    is_special = {number: token.special for number, token in added.items()}
    named = set(tokenizer.all_special_ids)

    def kind(number: int, token: str) -> int:
        if token not in known:
            return UNUSED
        if number == tokenizer.unk_token_id and number not in _others(tokenizer):
            return UNKNOWN
        if number in named or is_special.get(number):
            return CONTROL
        if number in is_special:
            return USER_DEFINED
        return BYTE if token in BYTES else NORMAL

    return tuple(kind(number, token) for number, token in enumerate(tokens))


def _others(tokenizer: PreTrainedTokenizerBase) -> set[int | None]:
    return {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}


def _split(state: Mapping[str, Any]) -> str:
    """The name of the rule by which a byte-level tokenizer splits texts."""
    normalizer = state["normalizer"] or {}
    steps = [step["type"] for step in normalizer.get("normalizers", [normalizer] if normalizer else [])]
    if set(steps) - {"NFC"}:
        raise ValueError(f"its tokenizer changes texts ({', '.join(steps)}), which llama.cpp does not repeat")
    outer = state["pre_tokenizer"] or {}
    parts = outer.get("pretokenizers", [outer])
    byte_level = [part for part in parts if part.get("type") == "ByteLevel"]
    if not byte_level or byte_level[0].get("add_prefix_space"):
        raise ValueError("its tokenizer does not split texts into bytes as GPT-2's does")
    patterns = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
    if byte_level[0].get("use_regex", True):
        patterns.append(GPT2_PATTERN)
    if len(patterns) != 1 or patterns[0] not in SPLITS or len(parts) != len(patterns) + (patterns[0] != GPT2_PATTERN):
        raise ValueError(f"its tokenizer splits texts by a rule that is not one of {', '.join(SPLITS.values())}")
    return SPLITS[patterns[0]]


def _puts_space_first(tokenizer: PreTrainedTokenizerBase) -> bool:
    tokens = tokenizer.tokenize("a")
    return bool(tokens) and tokens[0].startswith("▁")
