"""What the three selective tuners can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from left_trainer.registry import did_you_mean
from left_trainer.tuners.registration import peft_type
from left_trainer.tuners.selective.selection import LAYERS_FORM, TYPES

STACKS = ("both", "encoder", "decoder")


@dataclass
class SelectiveConfig(PeftConfig):
    """What all selective tuners share.

    Args:
        target_modules (`list[str]` or `str`, *optional*): Restrict the method to the modules with these names or
            endings of names, or whose whole name matches this regular expression. By default it takes every module it
            applies to. Parameters tied to a chosen one always follow it.
        modules_to_save (`list[str]`, *optional*): Further modules, such as a new classifier, to train and save whole.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Restrict the method to these modules: endings of names, or one regular expression."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules, such as a new classifier, to train and save whole."}
    )


@dataclass
class BitFitConfig(SelectiveConfig):
    r"""BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): train the biases, \(y = W x + b\) with \(W\) frozen.

    Every bias of the model is trained. Linear layers and norms without one, as in T5 and Llama, get one that starts
    at zero; the output head alone does not, as its vocabulary-sized bias would outweigh all others. A model that got
    biases cannot be merged, since its class has no place for them.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("bitfit")


@dataclass
class LayersConfig(SelectiveConfig):
    """Train chosen transformer blocks in full (Lee, Tang and Lin 2019, arXiv 1911.03090).

    The default is the paper's: the last quarter of the blocks reaches about 90% of full fine-tuning. Embeddings,
    final norms and the output head belong to no block and stay frozen.

    Args:
        layers (`str`, `int` or `list[int]`): `last:2`, `first:1`, `last:25%` (rounded up) or indices from 0 on, as
            `0,3` or `[0, 3]`. Encoder-decoder models are counted in the encoder and in the decoder separately.
        stack (`str`): Where to train on an encoder-decoder model: `both`, `encoder` or `decoder`.

    Raises `ValueError` for any other form, and on the model for more blocks than it has.
    """

    layers: str | int | list[int] = field(
        default="last:25%", metadata={"help": "The blocks to train: last:2, first:1, last:25% or indices as 0,3."}
    )
    stack: str = field(
        default="both", metadata={"help": "On an encoder-decoder model, train blocks of: both, encoder or decoder."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("layers")
        if isinstance(self.layers, list):
            valid = bool(self.layers) and all(type(index) is int and index >= 0 for index in self.layers)
        else:
            valid = LAYERS_FORM.fullmatch(str(self.layers)) is not None
        if not valid:
            raise ValueError(
                f"layers={self.layers!r} does not say which blocks to train."
                f"{did_you_mean(str(self.layers).partition(':')[0], ('first', 'last'))} Allowed: 'last:2', 'first:1', "
                "'last:25%' and indices from 0 on, as '0,3' or [0, 3]."
            )
        if self.stack not in STACKS:
            raise ValueError(
                f"stack={self.stack!r} is not known.{did_you_mean(self.stack, STACKS)} Allowed: {', '.join(STACKS)}."
            )


@dataclass
class ParameterTypesConfig(SelectiveConfig):
    """Train the parameters of chosen kinds (Touvron et al. 2022, arXiv 2203.09795, train the attention alone).

    Args:
        types (`list[str]` or `str`): One or several of
            `attention` (its projections and position biases, in self and cross attention),
            `query`, `key`, `value`, `output` (one of these projections, where the model keeps it apart),
            `feed_forward` (what is left in a block),
            `norms`, and
            `embeddings` (of tokens, positions and types; an output head tied to them stays tied).

    Raises `ValueError` for an unknown type, and on the model for a type it does not have.
    """

    types: list[str] | str = field(
        default_factory=lambda: ["attention"],
        metadata={"help": f"The kinds of parameters to train: {', '.join(TYPES)}."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("parameter_types")
        if isinstance(self.types, str):
            self.types = [self.types]
        if not self.types:
            raise ValueError(f"types={self.types!r} is empty. Allowed: {', '.join(TYPES)}.")
        for name in self.types:
            if name not in TYPES:
                raise ValueError(
                    f"types={self.types!r}: {name!r} is not known.{did_you_mean(name, TYPES)} "
                    f"Allowed: {', '.join(TYPES)}."
                )
