"""The tokens of whole texts, many at a time."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], argument: str = "text") -> list[list[int]]:
    """What `tokenizer(texts)` gives as `input_ids`: with special tokens, of any length.

    A fast tokenizer has its backend give the tokens alone, which takes half as long; where the first text shows that it
    does more than that, such as another beginning for targets, it is called itself.

    Args:
        tokenizer: Fast or slow.
        texts: To tokenize.
        argument: `text`, or `text_target` for what a decoder writes.
    """
    texts = list(texts)
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and _is_of_transformers(tokenizer):
        first = tokenizer(**{argument: texts[0]}, verbose=False)["input_ids"]  # which switches off truncation too
        if backend.encode_batch_fast(texts[:1])[0].ids == first:
            different = list(dict.fromkeys(texts))  # labels, and what else repeats, once each
            ids = [encoding.ids for encoding in backend.encode_batch_fast(different)]
            known = dict(zip(different, ids, strict=True))
            return [known[text] for text in texts]
    return tokenizer(**{argument: texts}, verbose=False)["input_ids"]


def _is_of_transformers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether nobody has put another call in the place of the library's own."""
    return type(tokenizer).__call__.__module__.partition(".")[0] == "transformers"
