"""PEFT's options of prompts in the input, and one more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from peft import MultitaskPromptTuningConfig, PeftConfig, PromptEncoderConfig, PromptTuningConfig

Position = Literal["before", "after"]


@dataclass
class InputPrompt(PeftConfig):
    """What our configs add to PEFT's. Plain PEFT loads the saved ones, and warns that it ignores the option.

    Args:
        prompt_position (`"before"`, `"after"` or `None`, defaults to `"before"`): Where virtual tokens stand in the
            encoder of an encoder-decoder model. `None` lets the model decide, when it is wrapped.
    """

    prompt_position: Position | None = field(
        default="before",
        metadata={
            "help": "Where virtual tokens stand in an encoder. 'before' the source, as in PEFT: they take its first "
            "positions and the decoder attends to them. 'after' it: the source keeps its positions and the decoder "
            "attends to the source alone. None: 'after' in encoders with absolute positions, else 'before'."
        },
    )


@dataclass
class PromptTuning(InputPrompt, PromptTuningConfig):
    """PEFT's `PromptTuningConfig`, with `prompt_position`."""

    replaces: ClassVar[type[PeftConfig]] = PromptTuningConfig


@dataclass
class PTuning(InputPrompt, PromptEncoderConfig):
    """PEFT's `PromptEncoderConfig`, with `prompt_position`."""

    replaces: ClassVar[type[PeftConfig]] = PromptEncoderConfig


@dataclass
class MultitaskPromptTuning(InputPrompt, MultitaskPromptTuningConfig):
    """PEFT's `MultitaskPromptTuningConfig`, with `prompt_position`."""

    replaces: ClassVar[type[PeftConfig]] = MultitaskPromptTuningConfig
