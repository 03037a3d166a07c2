"""Options of the three bottleneck adapters."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig
from transformers.activations import ACT2FN

from left_trainer.tuners.registration import peft_type

INIT_WEIGHTS = ("normal", "zero")


@dataclass
class BottleneckConfig(PeftConfig):
    r"""Options that all bottleneck adapters share.

    Args:
        target_modules: Names (suffixes) of the modules whose output is adapted, or one regular expression over full
            names. The default follows from the model type.
        exclude_modules: Names, or one regular expression, of modules to leave out.
        modules_to_save: Names of further modules to train and save in full.
        reduction_factor: The bottleneck has `hidden_size // reduction_factor` units, at least one.
        bottleneck_size: Units of the bottleneck; takes the place of `reduction_factor`.
        non_linearity: Activation function, by its name in `transformers`.
        dropout: Probability of dropping a unit of the adapter's change.
        scaling: Factor on the adapter's change.
        init_weights: `"normal"` draws both projections from a normal distribution of deviation 0.01, cut at two
            deviations: an adapter close to the identity, both projections of which get gradients in the first step.
            `"zero"` sets the up-projection to zero: an adapter that is the identity, the down-projection of which gets
            a gradient from the second step on.
        drop_layers: How many of the lower layers, of an encoder and a decoder alike, go without adapters: a number, or
            two for a range, from which each step of the training draws one (AdapterDrop, arXiv 2010.11918).
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names, or one regular expression, of the modules whose output is adapted."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or one regular expression, of modules to leave out."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Names of further modules to train and save in full."}
    )
    reduction_factor: int = field(
        default=16, metadata={"help": "The bottleneck has hidden_size // reduction_factor units."}
    )
    bottleneck_size: int | None = field(
        default=None, metadata={"help": "Units of the bottleneck; takes the place of reduction_factor."}
    )
    non_linearity: str = field(default="relu", metadata={"help": "Activation function, by its name in transformers."})
    dropout: float = field(default=0.0, metadata={"help": "Probability of dropping a unit of the adapter's change."})
    scaling: float = field(default=1.0, metadata={"help": "Factor on the adapter's change."})
    init_weights: str = field(
        default="normal",
        metadata={"help": "'normal': close to the identity; 'zero': up-projection zero, the identity."},
    )
    drop_layers: int | list[int] = field(
        default=0,
        metadata={"help": "Lower layers without adapters: a number, or two, between which each step draws."},
    )

    @property
    def fewest_dropped(self) -> int:
        """Number of lower layers that never have an adapter."""
        return self.drop_layers if isinstance(self.drop_layers, int) else self.drop_layers[0]

    @property
    def most_dropped(self) -> int:
        """Number of lower layers that may go without an adapter in a step of the training."""
        return self.drop_layers if isinstance(self.drop_layers, int) else self.drop_layers[1]

    def __post_init__(self) -> None:
        super().__post_init__()
        dropped = [self.drop_layers] if isinstance(self.drop_layers, int) else list(self.drop_layers)
        for name, value, valid, allowed in (
            ("reduction_factor", self.reduction_factor, self.reduction_factor >= 1, "at least 1"),
            (
                "bottleneck_size",
                self.bottleneck_size,
                self.bottleneck_size is None or self.bottleneck_size >= 1,
                "None or at least 1",
            ),
            ("dropout", self.dropout, 0 <= self.dropout < 1, "at least 0 and less than 1"),
            ("non_linearity", self.non_linearity, self.non_linearity in ACT2FN, f"one of {', '.join(sorted(ACT2FN))}"),
            (
                "drop_layers",
                self.drop_layers,
                len(dropped) in (1, 2) and dropped[0] >= 0 and (len(dropped) == 1 or dropped[0] < dropped[1]),
                "a number that is at least 0, or two, the first one below the second",
            ),
            ("init_weights", self.init_weights, self.init_weights in INIT_WEIGHTS, f"one of {', '.join(INIT_WEIGHTS)}"),
        ):
            if not valid:
                raise ValueError(f"{name}={value!r} is not valid: it must be {allowed}.")


@dataclass
class HoulsbyAdapterConfig(BottleneckConfig):
    """Options of Houlsby's adapters: one after every attention and every feed-forward sublayer.

    Houlsby et al. (2019), arXiv 1902.00751. The initialisation is the paper's (section 3.6); the activation function,
    which the paper leaves open, is that of the `adapters` library.

    Args:
        non_linearity: As above; `"swish"` by default.
    """

    non_linearity: str = field(default="swish", metadata={"help": "Activation function, by its name in transformers."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("houlsby_adapter")


@dataclass
class PfeifferAdapterConfig(BottleneckConfig):
    """Options of Pfeiffer's adapters: one after every feed-forward sublayer, reading the residual stream.

    Pfeiffer et al. (2020), MAD-X, arXiv 2005.00052, and AdapterFusion, arXiv 2005.00247.

    Args:
        input_module: Name of the module whose input is the residual stream at the entrance of the sublayer, as seen
            from the parent of a target module, with which it shares this parent. The default follows from the model
            type.
        norm_module: Name of the layer norm over the sublayer's sum, as seen from the parent of a target module; post-LN
            models only. The default follows from the model type.
        invertible: Put an invertible adapter (a NICE coupling) at the input of the first layer of the encoder, or of
            the decoder where there is no encoder.
        invertible_reduction_factor: The two networks of the coupling have `hidden_size // 2 //
            invertible_reduction_factor` hidden units.
    """

    input_module: str | None = field(
        default=None, metadata={"help": "Sibling of the target whose input is the residual stream."}
    )
    norm_module: str | None = field(
        default=None, metadata={"help": "Sibling of the target: the layer norm over the sum, in post-LN models."}
    )
    invertible: bool = field(
        default=False, metadata={"help": "Put an invertible adapter at the input of the first layer."}
    )
    invertible_reduction_factor: int = field(
        default=2, metadata={"help": "Half the hidden size over the hidden units of the coupling's networks."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("pfeiffer_adapter")
        if self.invertible and self.fewest_dropped:
            raise ValueError(
                f"invertible=True puts an adapter before the first layer, and drop_layers={self.drop_layers!r} leaves "
                "that layer without one. Set invertible=False, or let drop_layers begin at 0."
            )
        if self.invertible_reduction_factor < 1:
            raise ValueError(
                f"invertible_reduction_factor={self.invertible_reduction_factor!r} is not valid: it must be at least 1."
            )


@dataclass
class ParallelAdapterConfig(BottleneckConfig):
    """Options of parallel adapters: one beside every feed-forward sublayer, reading its input, scaled.

    He et al. (2022), arXiv 2110.04366, from where scaling and initialisation are. Their best results have a
    `reduction_factor` of 2.

    Args:
        input_module: Name of the module whose input the adapter reads, as seen from the parent of a target module,
            with which it shares this parent. The default follows from the model type and is the sublayer's input: in
            pre-LN models the residual stream before the layer norm, as in the `adapters` library. Name the target
            module itself to read the normalised input.
        scaling: As above; 4 by default.
        init_weights: As above; `"zero"` by default.
    """

    input_module: str | None = field(
        default=None, metadata={"help": "Sibling of the target whose input the adapter reads."}
    )
    scaling: float = field(default=4.0, metadata={"help": "Factor on the adapter's change."})
    init_weights: str = field(
        default="zero",
        metadata={"help": "'normal': close to the identity; 'zero': up-projection zero, the identity."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("parallel_adapter")
