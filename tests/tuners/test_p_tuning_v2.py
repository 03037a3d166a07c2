"""P-tuning v2: prefixes in every attention layer, exact in every way a model can be run."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed

from left_trainer.tuners.p_tuning_v2 import PTuningV2Config
from left_trainer.tuners.p_tuning_v2.attention import RoutedConfig
from left_trainer.tuners.p_tuning_v2.layer import PTuningV2Layer
from tiny import ENCODER_DECODER_TYPES, TINY_LLAMA, VOCABULARY_SIZE, tiny_model

TOKENS = 3
GROUPED = {**TINY_LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
MORE_CONFIGS: dict[str, dict[str, Any]] = {
    "opt": {**TINY_LLAMA, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 6},  # heads x head_dim differs from hidden_size
    "mistral": {**GROUPED, "sliding_window": 4},
}
DECODER_ONLY_TYPES = ("llama", "gpt2", *MORE_CONFIGS)
MODEL_TYPES = (*ENCODER_DECODER_TYPES, *DECODER_ONLY_TYPES)


def base_model(model_type: str, **overrides: Any) -> PreTrainedModel:
    if model_type not in MORE_CONFIGS:
        return tiny_model(model_type, **{"init_std": 0.3, **overrides})
    options = {**MORE_CONFIGS[model_type], "vocab_size": VOCABULARY_SIZE, **overrides}
    set_seed(0)
    config = AutoConfig.for_model(model_type, **options)
    for name in ("dropout", "attention_dropout"):
        setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_config(config).eval()


def tuned_model(model_type: str | PreTrainedModel, **options: Any) -> PeftModel:
    """With prefixes that are far from no effect."""
    model = base_model(model_type) if isinstance(model_type, str) else model_type
    set_seed(1)
    return get_peft_model(model, PTuningV2Config(**{"num_virtual_tokens": TOKENS, "init_std": 2.0, **options})).eval()


def batch(model: nn.Module, lengths: tuple[int, ...] = (7, 7)) -> dict[str, torch.Tensor]:
    """Padded on the right for encoders, on the left, with positions to match, for decoders."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY_SIZE, (len(lengths), max(lengths)), generator=generator)
    steps = torch.arange(max(lengths)).expand_as(ids)
    kept = torch.tensor(lengths)[:, None]
    if model.config.is_encoder_decoder:
        mask = (steps < kept).long()
        return {"input_ids": ids * mask, "attention_mask": mask, "decoder_input_ids": ids[:, :5].contiguous()}
    mask = (steps >= max(lengths) - kept).long()
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    return inputs if model.config.model_type == "opt" else {**inputs, "position_ids": (mask.cumsum(1) - 1).clamp(0)}


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def prefixes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if "p_tuning_v2_prefix" in name}


def attentions(model: nn.Module) -> list[PTuningV2Layer]:
    return [module for module in model.modules() if isinstance(module, PTuningV2Layer)]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_attention_layer_has_a_prefix_and_nothing_else_is_trained(model_type: str) -> None:
    base = base_model(model_type)
    config = base.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = 2 + 2 * 2 if config.is_encoder_decoder else 2
    before = copy.deepcopy(base.state_dict())
    model = tuned_model(base)
    model.train()

    assert len(attentions(model)) == layers
    assert model.get_nb_trainable_parameters()[0] == layers * 2 * TOKENS * heads * head_dim
    assert {name for name, value in model.named_parameters() if value.requires_grad} == set(prefixes(model))
    started = {name: value.detach().clone() for name, value in prefixes(model).items()}
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.1)
    inputs = batch(model, (7, 5))
    model(**inputs, labels=inputs.get("decoder_input_ids", inputs["input_ids"])).loss.backward()
    optimizer.step()
    assert all((value != started[name]).all() for name, value in prefixes(model).items())
    after = model.unload().state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_disabled_and_unloaded_it_is_the_base_model_bit_for_bit(model_type: str) -> None:
    base = base_model(model_type).requires_grad_(False)
    inputs = batch(base, (7, 5))
    expected = logits(base, inputs)
    model = tuned_model(base)
    assert (logits(model, inputs) - expected).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, inputs), expected)
    assert not attentions(unloaded)
    assert not any(isinstance(getattr(module, "config", None), RoutedConfig) for module in unloaded.modules())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("lengths", [(7, 7), (7, 4)], ids=["unpadded", "padded"])
def test_sdpa_equals_eager(model_type: str, lengths: tuple[int, ...]) -> None:
    model = tuned_model(model_type)
    inputs = batch(model, lengths)
    kept = ... if model.config.is_encoder_decoder else inputs["attention_mask"].bool()
    assert model.config._attn_implementation == "sdpa"
    expected = logits(model, inputs)
    model.base_model.model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, inputs)[kept], expected[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_padding_changes_nothing(model_type: str) -> None:
    model = tuned_model(model_type)
    inputs = batch(model, (7, 4))
    padded = logits(model, inputs)[1]
    kept = inputs["attention_mask"][1].bool()
    alone = {name: value[1:] if name == "decoder_input_ids" else value[1:, kept] for name, value in inputs.items()}
    expected = logits(model, alone)[0]
    torch.testing.assert_close(padded[-len(expected) :], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_generation_equals_uncached(model_type: str, beams: int) -> None:
    model = tuned_model(model_type)
    inputs = {name: value for name, value in batch(model, (7, 4)).items() if name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}
    cached = model.generate(**inputs, **options, use_cache=True)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
    with model.disable_adapter():
        assert not torch.equal(cached, model.generate(**inputs, **options))


@pytest.mark.parametrize("model_type", ["t5", "llama", "mistral"])
@pytest.mark.parametrize("lengths", [(7, 7), (7, 4)], ids=["unpadded", "padded"])
def test_a_static_cache_equals_a_dynamic_one(model_type: str, lengths: tuple[int, ...]) -> None:
    model = tuned_model(model_type)
    inputs = {name: value for name, value in batch(model, lengths).items() if name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), expected)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradient_checkpointing_gives_the_same_gradients(model_type: str) -> None:
    model = tuned_model(model_type).train()
    inputs = batch(model, (7, 4))
    labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    expected = torch.autograd.grad(model(**inputs, labels=labels).loss, list(prefixes(model).values()))
    for reentrant in (False, True):
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.zero_grad()
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        for value, gradient in zip(prefixes(model).values(), expected, strict=True):
            torch.testing.assert_close(value.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_equals_pefts_prefix_tuning_on_llama(kv_heads: int) -> None:
    base = base_model("llama", num_key_value_heads=kv_heads)
    theirs = get_peft_model(
        copy.deepcopy(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
    ).eval()
    ours = tuned_model(base)
    # Theirs: (tokens, layers x 2 x heads x head_dim). It sits in the cache, so the sequence starts at position TOKENS.
    table = torch.stack([value.detach() for value in prefixes(ours).values()])
    theirs.prompt_encoder["default"].embedding.weight.data = table.permute(3, 0, 1, 2, 4).reshape(TOKENS, -1)
    inputs = {"input_ids": batch(base)["input_ids"]}
    positions = torch.arange(7)[None] + TOKENS
    expected = logits(theirs, inputs)
    torch.testing.assert_close(logits(ours, {**inputs, "position_ids": positions}), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_equals_attention_written_out(model_type: str, implementation: str) -> None:
    r"""softmax(Q [P_K; K]^T + [0; bias + mask]) [P_V; V] in encoder, decoder and cross attention."""
    base = base_model(model_type, attn_implementation=implementation)
    model = tuned_model(base)
    inputs = batch(model, (7, 4))
    calls: list[tuple[PTuningV2Layer, torch.Tensor, dict[str, Any], torch.Tensor]] = []
    for layer in attentions(model):
        layer.register_forward_hook(
            lambda module, args, kwargs, output: calls.append(
                (module, args[0] if args else kwargs["hidden_states"], kwargs, output[0])
            ),
            with_kwargs=True,
        )
    logits(model, inputs)

    shared: dict[bool, torch.Tensor] = {}  # T5's first layers of encoder and decoder own the position bias
    assert len(calls) == 6
    for layer, hidden, options, output in calls:
        module = layer.base_layer
        source = options.get("key_value_states")
        cross, decoder = source is not None, module.is_decoder
        source = hidden if source is None else source
        if model_type == "t5":
            names, dim, scale = ("q", "k", "v", "o"), module.key_value_proj_dim, 1.0
        else:
            names, dim = ("q_proj", "k_proj", "v_proj", "out_proj"), module.head_dim
            scale = 1 / math.sqrt(dim)
        to_query, to_key, to_value, to_output = (getattr(module, name) for name in names)
        query, key, value = (
            project(states).unflatten(-1, (-1, dim)).transpose(1, 2)
            for project, states in ((to_query, hidden), (to_key, source), (to_value, source))
        )
        scores = query @ key.transpose(2, 3) * scale
        if model_type == "t5" and not cross:
            if module.has_relative_attention_bias:
                shared[decoder] = module.compute_bias(query.shape[2], key.shape[2])
            scores = scores + shared[decoder]
        if cross or not decoder:
            scores = scores.masked_fill(inputs["attention_mask"][:, None, None] == 0, -torch.inf)
        else:
            scores = scores + torch.full(scores.shape[2:], -torch.inf).triu(1)
        key_prefix, value_prefix = layer.p_tuning_v2_prefix["default"]
        weights = torch.cat([query @ key_prefix.mT * scale, scores], dim=-1).softmax(-1)
        heads = weights[..., :TOKENS] @ value_prefix + weights[..., TOKENS:] @ value
        torch.testing.assert_close(output, to_output(heads.transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-5)


def test_packed_sequences_each_see_the_prefix_and_not_each_other() -> None:
    model = tuned_model("llama")
    ids = batch(model)["input_ids"][:1]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    with torch.no_grad():  # transformers looks for packed sequences where no cache is asked for
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    second = logits(model, {"input_ids": ids[:, 4:], "position_ids": positions[:, 4:]})
    torch.testing.assert_close(packed[:, 4:], second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["t5", "bart", "llama", "gpt2"])
def test_attention_weights_are_recorded_with_the_prefix_first(model_type: str) -> None:
    model = tuned_model(base_model(model_type, attn_implementation="eager"))
    inputs = batch(model)
    outputs = model(**inputs, output_attentions=True)
    fields = ("encoder_attentions", "decoder_attentions", "cross_attentions")
    for field in fields if model.config.is_encoder_decoder else ("attentions",):
        for weights in outputs[field]:
            keys = 5 if field == "decoder_attentions" else 7
            assert weights.shape[-1] == TOKENS + keys
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_saved_and_loaded_it_is_the_same(model_type: str, tmp_path: Path) -> None:
    model = tuned_model(model_type, prefix_dropout=0.1)
    inputs = batch(model)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(base_model(model_type), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))
        assert not any(value.requires_grad for value in loaded.parameters())
    assert loaded.peft_config["default"].prefix_dropout == 0.1


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_several_adapters(model_type: str) -> None:
    model = tuned_model(model_type)
    inputs = batch(model)
    first = logits(model, inputs)
    model.add_adapter("second", PTuningV2Config(num_virtual_tokens=5, init_std=2.0))
    assert torch.equal(logits(model, inputs), first)
    assert all(value.requires_grad == name.endswith("default") for name, value in prefixes(model).items())
    model.set_adapter("second")
    second = logits(model, inputs)
    assert (second - first).abs().max() > 1e-3
    assert all(value.requires_grad == name.endswith("second") for name, value in prefixes(model).items())
    model.base_model.set_adapter(["default", "second"])  # both: their prefixes one after the other
    assert attentions(model)[0].key_value_prefix().shape[2] == TOKENS + 5
    model.set_adapter("default")
    assert torch.equal(logits(model, inputs), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model, inputs), first)
    assert len(prefixes(model)) == len(attentions(model))


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_adapters_may_differ_in_the_layers_they_reach(model_type: str) -> None:
    names = {"t5": "EncDecAttention", "llama": r".*layers\.0\.self_attn"}
    model = tuned_model(model_type, target_modules=[names["t5"]] if model_type == "t5" else names["llama"])
    inputs = batch(model)
    first = logits(model, inputs)
    model.add_adapter("everywhere", PTuningV2Config(num_virtual_tokens=2))
    assert torch.equal(logits(model, inputs), first)
    model.set_adapter("everywhere")
    assert len([value for value in prefixes(model).values() if value.requires_grad]) == len(attentions(model))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_half_precision_base_with_full_precision_prefixes(model_type: str) -> None:
    model = tuned_model(base_model(model_type).bfloat16())
    inputs = batch(model, (7, 4))
    outputs = model(**inputs, labels=inputs.get("decoder_input_ids", inputs["input_ids"]))
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16
    assert all(value.dtype == value.grad.dtype == torch.float32 for value in prefixes(model).values())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_counts_on_the_meta_device(model_type: str) -> None:
    expected = tuned_model(model_type).get_nb_trainable_parameters()
    with torch.device("meta"):
        model = get_peft_model(base_model(model_type), PTuningV2Config(num_virtual_tokens=TOKENS))
    assert model.get_nb_trainable_parameters() == expected
    assert all(value.is_meta for value in prefixes(model).values())


def test_a_copy_is_independent() -> None:
    model = tuned_model("llama")
    inputs = batch(model)
    expected = logits(model, inputs)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), inputs), expected)
    copied = copy.deepcopy(model)
    for value in prefixes(copied).values():
        value.data.zero_()
    assert torch.equal(logits(model, inputs), expected)
    assert not torch.equal(logits(copied, inputs), expected)
    assert attentions(copied)[0].base_layer.config.original is copied.base_model.model.config


def test_dropout_acts_in_training_alone() -> None:
    model = tuned_model("t5", prefix_dropout=0.5)
    inputs = batch(model)
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    model.train()
    assert not torch.equal(logits(model, inputs), logits(model, inputs))


def test_it_cannot_be_merged() -> None:
    model = tuned_model("llama")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()


@pytest.mark.parametrize(("option", "value"), [("num_virtual_tokens", 0), ("init_std", -1.0), ("prefix_dropout", 1.0)])
def test_refuses_options_outside_of_their_range(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option}={value}"):
        PTuningV2Config(**{option: value})


def test_refuses_targets_that_are_no_attention() -> None:
    base = base_model("llama")
    with pytest.raises(ValueError, match=r"q_proj, a Linear.*\['self_attn'\]"):
        get_peft_model(base, PTuningV2Config(target_modules=["q_proj"]))
    assert not attentions(base)
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(base, PTuningV2Config(target_modules=["nothing"]))


def test_refuses_models_that_go_round_the_attention_interface() -> None:
    config = AutoConfig.for_model("bloom", hidden_size=16, n_layer=1, n_head=2, vocab_size=VOCABULARY_SIZE)
    with pytest.raises(ValueError, match="model_type='bloom'"):
        get_peft_model(AutoModelForCausalLM.from_config(config), PTuningV2Config())
    upcast = base_model("gpt2", attn_implementation="eager", reorder_and_upcast_attn=True)
    with pytest.raises(ValueError, match="reorder_and_upcast_attn=True"):
        get_peft_model(upcast, PTuningV2Config())


def test_refuses_attention_that_does_not_tell_its_shape() -> None:
    base = base_model("llama")
    del base.model.layers[1].self_attn.head_dim
    with pytest.raises(ValueError, match="LlamaAttention does not give"):
        get_peft_model(base, PTuningV2Config())
    assert not attentions(base)


def test_refuses_attention_whose_mask_has_no_room_for_a_prefix() -> None:
    base = base_model("llama")
    base.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"attn_implementation='flex_attention'.*sdpa"):
        get_peft_model(base, PTuningV2Config())
    model = tuned_model("llama")
    model.base_model.model.config._attn_implementation = "flash_attention_2"
    layer = attentions(model)[0]
    states = torch.zeros(1, 2, 16)
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'"):
        layer(states, position_embeddings=(torch.ones(1, 2, 8), torch.zeros(1, 2, 8)), attention_mask=None)
