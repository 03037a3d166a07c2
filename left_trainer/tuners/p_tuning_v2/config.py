"""Options of P-tuning v2."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from left_trainer.tuners.registration import peft_type


@dataclass
class PTuningV2Config(PeftConfig):
    """Options of [`PTuningV2Model`].

    Args:
        num_virtual_tokens (`int`, defaults to 20): Length of the prefix of each attention layer.
        init_std (`float`, defaults to 0.02): Prefixes start at N(0, init_std^2).
        prefix_dropout (`float`, defaults to 0.0): Dropout on the prefixes in training.
        target_modules (`list[str]` or `str`, *optional*): Names, or a regular expression, of the attention modules
            that get a prefix. Every attention layer when left out.
        exclude_modules (`list[str]` or `str`, *optional*): Names, or a regular expression, of attention modules to
            leave out.
        modules_to_save (`list[str]`, *optional*): Other modules to train whole and save, such as a classifier's head.

    Raises:
        ValueError: An option is outside of its range.
    """

    num_virtual_tokens: int = field(
        default=20, metadata={"help": "Number of trained key/value pairs in front of each attention layer's own."}
    )
    init_std: float = field(
        default=0.02, metadata={"help": "Standard deviation of the normal distribution that prefixes start from."}
    )
    prefix_dropout: float = field(default=0.0, metadata={"help": "Dropout on the prefixes in training, in [0, 1)."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names, or a regular expression, of the attention modules that get a prefix. "
            "Every attention layer of encoder and decoder when left out."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or a regular expression, of the attention modules to leave out."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train whole and save, such as a classifier's head."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("p_tuning_v2")
        if self.num_virtual_tokens < 1:
            raise ValueError(f"num_virtual_tokens={self.num_virtual_tokens}: must be at least 1, for example 20.")
        if self.init_std < 0:
            raise ValueError(f"init_std={self.init_std}: must be at least 0, for example 0.02.")
        if not 0 <= self.prefix_dropout < 1:
            raise ValueError(f"prefix_dropout={self.prefix_dropout}: must be in [0, 1), for example 0.1.")
