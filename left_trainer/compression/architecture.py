"""Where the model types that can be shrunk keep their blocks, feed-forward neurons and attention heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Stack:
    """A stack of equal blocks.

    Args:
        name: `encoder` or `decoder`; the only stack of a decoder-only model is its `decoder`.
        dimension: What `shrink_to` calls the number of its blocks.
        blocks: Name of the `ModuleList` in the model with its output head.
        layers_field: Field of the config with the number of blocks.
        ffn_field: Field of the config with the width of the feed-forward modules.
        feed_forward: Name, in a block, of the module that holds the feed-forward layers; empty for the block itself.
        attentions: Names, in a block, of its attention modules.
        heads_field: Field of the config with the number of attention heads.
    """

    name: str
    dimension: str
    blocks: str
    layers_field: str
    ffn_field: str
    feed_forward: str
    attentions: tuple[str, ...]
    heads_field: str


@dataclass(frozen=True)
class Block:
    """A block of a model, by full module names in the base model.

    Args:
        stack: The stack it is in.
        index: Its place there, from 0.
        name: `model.layers.3`.
        feed_forward: The module that holds the feed-forward layers; `name` where the block holds them itself.
        attentions: Its attention modules.
    """

    stack: str
    index: int
    name: str
    feed_forward: str
    attentions: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """What shrinking has to know of a model type.

    Args:
        stacks: From the input to the output.
        feed_forward_inputs: Linear layers whose outputs are neurons; a feed-forward module has those that exist.
        feed_forward_output: The linear layer that reads the neurons.
        queries, keys, values: Linear layers of an attention whose outputs are heads; empty where the heads stay.
        attention_output: The linear layer that reads the heads.
        groups_field: Field of the config with the number of key and value heads, where queries share them.
        head_size_field: Field of the config that sets the size of a head apart from the width of the model; `None`
            where the class ties the two, so that no head can be removed.
        heads_divide_width: Whether the class demands that the number of heads divides the width.
        first_block_only: Name, in a block, of a module that only the first block of a stack has and all of them use.
        shared_bias: The attention whose heads are numbered alike in all blocks of a stack, because one table of the
            first block has a column for each; `None` where blocks are free.
        per_layer_fields: Lists of the config with an entry for each block.
        cache_layers_field: Field of the config that `generate` takes the number of layers of the cache from, where the
            class has none of its own for the decoder; `None` where it finds it.
    """

    stacks: tuple[Stack, ...]
    feed_forward_inputs: tuple[str, ...]
    feed_forward_output: str
    queries: str
    keys: str
    values: str
    attention_output: str
    groups_field: str | None = None
    head_size_field: str | None = None
    heads_divide_width: bool = False
    first_block_only: str | None = None
    shared_bias: str | None = None
    per_layer_fields: tuple[str, ...] = ()
    cache_layers_field: str | None = None

    @property
    def has_free_heads(self) -> bool:
        """Whether the number of heads may differ from width / head size."""
        return self.head_size_field is not None

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of `shrink_to` for the numbers of blocks."""
        return tuple(stack.dimension for stack in self.stacks)

    def stack(self, name: str) -> Stack:
        return next(stack for stack in self.stacks if stack.name == name)

    def blocks(self, config: PreTrainedConfig) -> Iterator[Block]:
        """The blocks of a model with this config, from the input to the output."""
        for stack in self.stacks:
            for index in range(getattr(config, stack.layers_field)):
                name = f"{stack.blocks}.{index}"
                yield Block(
                    stack=stack.name,
                    index=index,
                    name=name,
                    feed_forward=f"{name}.{stack.feed_forward}" if stack.feed_forward else name,
                    attentions=tuple(f"{name}.{attention}" for attention in stack.attentions),
                )

    def stack_of(self, name: str) -> str:
        """The stack that a module with this full name is in."""
        return next(stack.name for stack in self.stacks if name.startswith(f"{stack.blocks}."))

    def block_of(self, name: str) -> int:
        """The number of the block that a module with this full name is in."""
        blocks = self.stack(self.stack_of(name)).blocks
        return int(name.removeprefix(f"{blocks}.").partition(".")[0])

    def why_heads_stay(self, config: PreTrainedConfig) -> str:
        """Why no head can be removed, where `has_free_heads` is false."""
        return (
            f"heads= does not work for model type {config.model_type!r}: its class takes the size of a head from the "
            "width of the model and the number of heads, so that fewer heads would be larger ones. Leave heads= out: "
            "the numbers of layers and ffn= can shrink, and params= uses these two."
        )

    def equal_heads(self, config: PreTrainedConfig) -> list[tuple[str, ...]]:
        """Attentions, by full name, that must keep the same heads: in T5 the self-attentions of a stack.

        Each attention stands in one of the tuples, most of them alone.
        """
        blocks = list(self.blocks(config))
        shared = {
            stack.name: tuple(f"{block.name}.{self.shared_bias}" for block in blocks if block.stack == stack.name)
            for stack in self.stacks
            if self.shared_bias
        }
        together = {name for names in shared.values() for name in names}
        alone = [(name,) for block in blocks for name in block.attentions if name not in together]
        return [*shared.values(), *alone]


T5_ENCODER = Stack(
    name="encoder",
    dimension="encoder_layers",
    blocks="encoder.block",
    layers_field="num_layers",
    ffn_field="d_ff",
    feed_forward="layer.1.DenseReluDense",
    attentions=("layer.0.SelfAttention",),
    heads_field="num_heads",
)
T5 = Architecture(
    stacks=(
        T5_ENCODER,
        replace(
            T5_ENCODER,
            name="decoder",
            dimension="decoder_layers",
            blocks="decoder.block",
            layers_field="num_decoder_layers",
            feed_forward="layer.2.DenseReluDense",
            attentions=("layer.0.SelfAttention", "layer.1.EncDecAttention"),
        ),
    ),
    feed_forward_inputs=("wi", "wi_0", "wi_1"),
    feed_forward_output="wo",
    queries="q",
    keys="k",
    values="v",
    attention_output="o",
    head_size_field="d_kv",
    first_block_only="layer.0.SelfAttention.relative_attention_bias",
    shared_bias="layer.0.SelfAttention",
    cache_layers_field="decoder_layers",
)
BART_ENCODER = Stack(
    name="encoder",
    dimension="encoder_layers",
    blocks="model.encoder.layers",
    layers_field="encoder_layers",
    ffn_field="encoder_ffn_dim",
    feed_forward="",
    attentions=("self_attn",),
    heads_field="encoder_attention_heads",
)
BART = Architecture(
    stacks=(
        BART_ENCODER,
        Stack(
            name="decoder",
            dimension="decoder_layers",
            blocks="model.decoder.layers",
            layers_field="decoder_layers",
            ffn_field="decoder_ffn_dim",
            feed_forward="",
            attentions=("self_attn", "encoder_attn"),
            heads_field="decoder_attention_heads",
        ),
    ),
    feed_forward_inputs=("fc1",),
    feed_forward_output="fc2",
    queries="q_proj",
    keys="k_proj",
    values="v_proj",
    attention_output="out_proj",
)
QWEN2 = Architecture(
    stacks=(
        Stack(
            name="decoder",
            dimension="layers",
            blocks="model.layers",
            layers_field="num_hidden_layers",
            ffn_field="intermediate_size",
            feed_forward="mlp",
            attentions=("self_attn",),
            heads_field="num_attention_heads",
        ),
    ),
    feed_forward_inputs=("gate_proj", "up_proj"),
    feed_forward_output="down_proj",
    queries="q_proj",
    keys="k_proj",
    values="v_proj",
    attention_output="o_proj",
    groups_field="num_key_value_heads",
    head_size_field="head_dim",
    per_layer_fields=("layer_types",),
)
GPT2 = Architecture(
    stacks=(
        Stack(
            name="decoder",
            dimension="layers",
            blocks="transformer.h",
            layers_field="n_layer",
            ffn_field="n_inner",
            feed_forward="mlp",
            attentions=("attn",),
            heads_field="n_head",
        ),
    ),
    feed_forward_inputs=("c_fc",),
    feed_forward_output="c_proj",
    queries="c_attn",
    keys="c_attn",
    values="c_attn",
    attention_output="c_proj",
)
OPT = Architecture(
    stacks=(
        Stack(
            name="decoder",
            dimension="layers",
            blocks="model.decoder.layers",
            layers_field="num_hidden_layers",
            ffn_field="ffn_dim",
            feed_forward="",
            attentions=("self_attn",),
            heads_field="num_attention_heads",
        ),
    ),
    feed_forward_inputs=("fc1",),
    feed_forward_output="fc2",
    queries="q_proj",
    keys="k_proj",
    values="v_proj",
    attention_output="out_proj",
)
ARCHITECTURES = {
    "t5": T5,
    "mt5": T5,
    "bart": BART,
    "mbart": BART,
    "marian": BART,
    "pegasus": BART,
    "llama": replace(QWEN2, heads_divide_width=True),
    "qwen2": QWEN2,
    "mistral": QWEN2,
    "gpt2": GPT2,
    "opt": OPT,
}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The record of the model type of `config`.

    Raises:
        ValueError: A type without a record, or a shape of it that parts cannot be taken from.
    """
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ValueError(
            f"shrink_to does not support the model type {config.model_type!r}: what is missing is a record of its "
            f"blocks, feed-forward layers and attention heads. Supported types: {', '.join(ARCHITECTURES)}."
        )
    if bool(config.is_encoder_decoder) != (len(architecture.stacks) == 2):
        raise ValueError(
            f"shrink_to supports {config.model_type!r} as "
            f"{'an encoder-decoder' if len(architecture.stacks) == 2 else 'a decoder-only'} model, and this config "
            f"has is_encoder_decoder={config.is_encoder_decoder}."
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ValueError(
            "shrink_to does not support scale_attn_by_inverse_layer_idx=True: each block divides its attention by its "
            "own number, so that a block that moves up would compute something else."
        )
    return architecture
