"""Virtual tokens: where a method puts them, and how many positions of the model they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from left_trainer.models import ModelFamily

NUM_VIRTUAL_TOKENS = 20


class Positions(NamedTuple):
    """Positions that a method takes from a model's own.

    Args:
        source: Of the encoder; of the whole sequence in a decoder-only model.
        target: Of the decoder of an encoder-decoder model.
    """

    source: int = 0
    target: int = 0


def option_num_virtual_tokens(options: Mapping[str, Any]) -> int:
    return int(options.get("num_virtual_tokens") or 0)


@dataclass(frozen=True)
class VirtualTokens:
    """Virtual tokens that stand in the sequence and take positions of the model.

    Prefixes inside of the attention layers (`p_tuning_v2`, `adaption_prompt`) take none and are not described by this.

    Args:
        place: `input`: embeddings beside those of the input. `decoder_cache`: keys and values in the cache of the
            decoder, which is the whole model in a decoder-only one.
        count: Their number, from the method's options.
    """

    place: Literal["input", "decoder_cache"]
    count: Callable[[Mapping[str, Any]], int] = option_num_virtual_tokens

    def positions(self, options: Mapping[str, Any], family: ModelFamily) -> Positions:
        """The positions that they take in a model of `family`.

        Args:
            options: All of the method's: its defaults and the user's.
            family: Of the model.
        """
        count = self.count(options)
        if family == "decoder_only":
            return Positions(source=count)
        if self.place == "decoder_cache":
            return Positions(target=count)
        return Positions(source=count)


BEFORE_INPUT = VirtualTokens("input")
IN_DECODER_CACHE = VirtualTokens("decoder_cache")
