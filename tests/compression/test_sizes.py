"""Sizes of models: what they are, what can be asked for, and how many parameters they come to."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from left_trainer import apply_method
from left_trainer.compression.architecture import ARCHITECTURES, architecture_of
from left_trainer.compression.cuts import size_left
from left_trainer.compression.removal import remove_parts
from left_trainer.compression.size_text import described
from left_trainer.compression.sizes import (
    Size,
    check_target,
    counted_parameters,
    narrowed,
    parameters_at,
    possible_heads,
    size_for,
    size_of,
    smallest_size,
)
from shrinkable import SHRINKABLE, shrinkable, some_parts
from tiny import tiny_model


def config_of(model_type: str, **overrides):
    return AutoConfig.for_model(model_type, **overrides)


T5 = config_of("t5")  # 6 and 6 blocks, 8 heads, 2048 neurons
LLAMA = config_of("llama", num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, hidden_size=64)
BART = config_of("bart")


# Parameters


@pytest.mark.parametrize("name", SHRINKABLE)
def test_parameters_from_shapes_are_those_of_the_model_and_of_its_file(name, tmp_path):
    model = shrinkable(name)
    config, kept = model.config, some_parts(model.config)
    size = size_left(config, kept)
    assert parameters_at(config, size_of(config)) == counted_parameters(model)
    expected = parameters_at(config, size)
    remove_parts(model, kept)
    assert size_of(model.config) == size
    assert counted_parameters(model) == expected
    model.save_pretrained(tmp_path)
    tables = ("shared", "embed_tokens", "embed_positions", "wte", "wpe", "lm_head", "final_logits_bias")
    stored = {
        key: tensor.numel()
        for key, tensor in load_file(tmp_path / "model.safetensors").items()
        if not any(table in key.split(".") for table in tables)
    }
    assert sum(stored.values()) == expected


def test_an_adapter_does_not_count():
    plain = tiny_model("t5")
    assert counted_parameters(apply_method(tiny_model("t5"), "lora")) == counted_parameters(plain)


def test_each_dimension_that_shrinks_takes_parameters_away():
    whole = size_of(LLAMA)
    for smaller in (
        Size({"decoder": 3}, whole.ffn, whole.heads),
        Size(whole.layers, {"decoder": 8}, whole.heads),
        Size(whole.layers, whole.ffn, 1),
    ):
        assert parameters_at(LLAMA, smaller) < parameters_at(LLAMA, whole)


# Sizes that are asked for


def test_dimensions_that_are_not_named_stay():
    assert size_for(T5, {}) == size_of(T5) == Size({"encoder": 6, "decoder": 6}, {"encoder": 2048, "decoder": 2048}, 8)
    assert size_for(T5, {"encoder_layers": 4, "decoder_layers": 2, "ffn": 0.5, "heads": 0.5, "params": 0.6}) == Size(
        {"encoder": 4, "decoder": 2}, {"encoder": 1024, "decoder": 1024}, 4
    )
    assert size_for(LLAMA, {"layers": 1, "heads": 0.5}).heads == 1
    assert size_for(BART, {"ffn": 0.25}).heads is None
    assert size_of(config_of("gpt2")).ffn == {"decoder": 3072}


def test_one_layer_is_a_layer():
    before = Size({"decoder": 3}, {"decoder": 64}, 4)
    assert described(before, Size({"decoder": 1}, {"decoder": 64}, 1)) == "3 layers, 4 heads -> 1 layer, 1 head"


def test_widths_are_multiples_of_8_from_64_on_and_never_0():
    assert [narrowed(width, 0.5) for width in (100, 64, 63, 33, 2, 1)] == [48, 32, 32, 16, 1, 1]
    assert [narrowed(width, 1e-6) for width in (4096, 64, 63)] == [8, 8, 1]
    assert [narrowed(width, 1) for width in (100, 33)] == [100, 33]


def test_heads_that_a_class_can_have():
    assert possible_heads(T5) == tuple(range(1, 9))
    assert possible_heads(config_of("llama", hidden_size=48, num_attention_heads=6)) == (1, 2, 3, 4, 6)
    assert possible_heads(config_of("mistral", hidden_size=40, num_attention_heads=5, num_key_value_heads=5)) == (
        1,
        2,
        3,
        4,
        5,
    )
    assert possible_heads(BART) == ()


def test_the_smallest_size_keeps_to_what_is_named():
    assert smallest_size(T5, {"encoder_layers": 4}) == Size(
        {"encoder": 4, "decoder": 1}, {"encoder": 8, "decoder": 8}, 1
    )
    assert smallest_size(BART, {"ffn": 0.5}) == Size(
        {"encoder": 1, "decoder": 1}, {"encoder": 2048, "decoder": 2048}, None
    )


@pytest.mark.parametrize(
    ("config", "target"),
    [
        (T5, {"params": 0.6}),
        (T5, {"params": 1, "vocabulary": "data"}),
        (T5, {"encoder_layers": 6, "decoder_layers": 1, "ffn": 1.0, "heads": 0.125}),
        (LLAMA, {"layers": 1, "heads": 0.5, "params": 0.1}),
        (config_of("mistral", num_attention_heads=6, num_key_value_heads=3), {"heads": 0.33}),
        (BART, {"ffn": 0.01}),
    ],
)
def test_what_can_be_done_passes(config, target):
    check_target(config, target)


@pytest.mark.parametrize(
    ("config", "target", "message"),
    [
        (T5, {"layer": 3}, "unknown dimension 'layer'. Did you mean 'layers'"),
        (T5, {"layers": 3}, "encoder_layers= and decoder_layers="),
        (LLAMA, {"encoder_layers": 2}, "one stack of layers. Write layers="),
        (LLAMA, {"decoder_layers": 2}, "one stack of layers. Write layers="),
        (T5, {"encoder_layers": 7}, "from 1 to 6"),
        (T5, {"decoder_layers": 0}, "from 1 to 6"),
        (T5, {"decoder_layers": 0.5}, "expected a whole number"),
        (T5, {"decoder_layers": True}, "expected a whole number"),
        (T5, {"ffn": 0}, "above 0 and at most 1"),
        (T5, {"ffn": 1.5}, "above 0 and at most 1"),
        (T5, {"params": -0.1}, "above 0 and at most 1"),
        (T5, {"params": "half"}, "above 0 and at most 1"),
        (T5, {"heads": True}, "above 0 and at most 1"),
        (T5, {"heads": float("nan")}, "above 0 and at most 1"),
        (T5, {"heads": 0.3}, "heads=0.125, 0.25"),
        (T5, {"heads": 0.001}, "expected a whole number"),
        (LLAMA, {"heads": 0.4}, "of 2 groups of heads"),
        (config_of("llama", hidden_size=48, num_attention_heads=6), {"heads": 5 / 6}, "divides the width 48"),
        (BART, {"heads": 0.5}, "heads= does not work for model type 'bart'"),
        (config_of("gpt2"), {"heads": 0.5}, "heads= does not work for model type 'gpt2'"),
        (config_of("opt"), {"heads": 0.5}, "heads= does not work for model type 'opt'"),
        (T5, {"params": 0.0001}, "the smallest size"),
        (T5, {"params": 0.3, "encoder_layers": 6, "ffn": 1.0, "heads": 1.0}, "the smallest size"),
        (config_of("bert"), {"params": 0.5}, "does not support the model type 'bert'.*Supported types: t5, mt5"),
        (config_of("gpt2", scale_attn_by_inverse_layer_idx=True), {"layers": 3}, "scale_attn_by_inverse_layer_idx"),
        (config_of("bart", is_encoder_decoder=False, is_decoder=True), {"ffn": 0.5}, "as an encoder-decoder model"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_fix(config, target, message):
    with pytest.raises(ValueError, match=message):
        check_target(config, target)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_names_of_a_record_are_those_of_the_model(model_type):
    model = tiny_model(model_type)
    architecture = architecture_of(model.config)
    for block in architecture.blocks(model.config):
        feed_forward = model.get_submodule(block.feed_forward)
        assert any(hasattr(feed_forward, name) for name in architecture.feed_forward_inputs)
        assert hasattr(feed_forward, architecture.feed_forward_output)
        for name in block.attentions:
            attention = model.get_submodule(name)
            for linear in (
                architecture.queries,
                architecture.keys,
                architecture.values,
                architecture.attention_output,
            ):
                assert hasattr(attention, linear)
        assert architecture.stack_of(block.feed_forward) == block.stack
        assert architecture.block_of(block.name) == block.index
