"""Bottleneck adapters as PEFT tuners: what has to hold on every model type."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed

from left_trainer.tuners.bottleneck import HoulsbyAdapterConfig, ParallelAdapterConfig, PfeifferAdapterConfig
from left_trainer.tuners.bottleneck.layer import BottleneckLayer
from left_trainer.tuners.bottleneck.layouts import LAYOUTS
from tiny import ENCODER_DECODER_TYPES, TINY_LLAMA, VOCABULARY_SIZE, tiny_model

CONFIGS = {
    "houlsby": lambda **options: HoulsbyAdapterConfig(reduction_factor=4, **options),
    "pfeiffer": lambda **options: PfeifferAdapterConfig(reduction_factor=4, **options),
    "pfeiffer_invertible": lambda **options: PfeifferAdapterConfig(reduction_factor=4, invertible=True, **options),
    "parallel": lambda **options: ParallelAdapterConfig(reduction_factor=4, **options),
}
ROPE_FREE = {name: value for name, value in TINY_LLAMA.items() if name != "initializer_range"}
OTHER_DECODERS = {
    "opt": {**ROPE_FREE, "ffn_dim": 32, "word_embed_proj_dim": 16, "init_std": 0.3, "dropout": 0.0},
    "opt_post_layer_norm": {
        **ROPE_FREE,
        "ffn_dim": 32,
        "word_embed_proj_dim": 16,
        "init_std": 0.3,
        "dropout": 0.0,
        "do_layer_norm_before": False,
    },
    "mistral": {**TINY_LLAMA, "num_key_value_heads": 1},
    "qwen2": {**TINY_LLAMA, "num_key_value_heads": 1},
    "qwen3": {**TINY_LLAMA, "num_key_value_heads": 1, "head_dim": 8},
}
MODEL_TYPES = (*ENCODER_DECODER_TYPES, "gpt2", "llama", *OTHER_DECODERS)
CASES = [(model_type, method) for model_type in MODEL_TYPES for method in CONFIGS]
ALL_CASES = pytest.mark.parametrize(("model_type", "method"), CASES)


def base_model(model_type: str) -> PreTrainedModel:
    if model_type not in OTHER_DECODERS:
        return tiny_model(model_type)
    set_seed(0)
    config = AutoConfig.for_model(
        model_type.removesuffix("_post_layer_norm"), vocab_size=VOCABULARY_SIZE, **OTHER_DECODERS[model_type]
    )
    return AutoModelForCausalLM.from_config(config).eval()


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, VOCABULARY_SIZE, (2, 6), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[1, 4:] = 0
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": input_ids[:, :5].contiguous() if is_seq2seq(model) else input_ids,
    }


def is_seq2seq(model: nn.Module) -> bool:
    return bool(model.config.is_encoder_decoder)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits


def adapter_weights(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if f".{adapter_name}." in name and "bottleneck_" in name}


def adapted(model_type: str, method: str, seed: int = 1, **options: Any) -> PeftModel:
    """A model whose adapter is far from the identity."""
    model = get_peft_model(base_model(model_type), CONFIGS[method](**options)).eval()
    randomize(model, seed)
    return model


def randomize(model: nn.Module, seed: int, adapter_name: str = "default") -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_weights(model, adapter_name).values():
            parameter.normal_(std=0.5, generator=generator)


def test_every_model_type_of_the_table_is_tested():
    assert {model_type.removesuffix("_post_layer_norm") for model_type in MODEL_TYPES} == set(LAYOUTS)


@ALL_CASES
def test_training_moves_exactly_the_adapter(model_type: str, method: str):
    model = get_peft_model(base_model(model_type), CONFIGS[method](init_weights="normal"))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_weights(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    model(**inputs(model)).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable


@ALL_CASES
def test_a_saved_adapter_gives_the_same_logits(model_type: str, method: str, tmp_path: Path):
    model = adapted(model_type, method)
    expected = logits(model)
    assert not torch.allclose(expected, logits(base_model(model_type)), atol=1e-3)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(base_model(model_type), tmp_path, adapter_name="other")
    assert torch.equal(logits(reloaded), expected)
    assert type(reloaded.peft_config["other"]) is type(model.peft_config["default"])
    low_memory = PeftModel.from_pretrained(base_model(model_type), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(low_memory), expected)


@ALL_CASES
def test_adapters_can_be_added_switched_disabled_deleted_and_unloaded(model_type: str, method: str):
    base = base_model(model_type)
    base_logits = logits(base)
    model = adapted(model_type, method)
    first = logits(model)
    model.add_adapter("second", CONFIGS[method]())
    randomize(model, 2, "second")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(first, second, atol=1e-3)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapter_weights(model, "second"))
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits)
    assert torch.equal(logits(model), second)
    model.set_adapter("default")
    model.delete_adapter("second")
    model.add_adapter("second", CONFIGS[method]())
    randomize(model, 2, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), base_logits)
    assert not any(module._forward_pre_hooks for module in unloaded.modules())
    assert unloaded.state_dict().keys() == base.state_dict().keys()


@ALL_CASES
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(model_type: str, method: str):
    results = []
    for checkpointing in (False, True):
        model = adapted(model_type, method).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(**inputs(model), use_cache=False).loss
        loss.backward()
        results.append((loss, [p.grad for p in adapter_weights(model).values()]))
    # Not bit by bit: under checkpointing, scaled dot-product attention may pick another kernel.
    torch.testing.assert_close(results[0][0], results[1][0], atol=0, rtol=1e-6)
    for plain, checkpointed in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(plain, checkpointed)


@ALL_CASES
def test_generation_with_a_cache_equals_generation_without(model_type: str, method: str):
    model = adapted(model_type, method)
    prompt = {name: value[:1] for name, value in inputs(model).items() if name != "labels"}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(**prompt, **options, use_cache=True)
    plain = model.generate(**prompt, **options, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-4)


@ALL_CASES
def test_parameters_are_counted_on_the_meta_device(model_type: str, method: str):
    with torch.device("meta"):
        model = get_peft_model(base_model(model_type), CONFIGS[method]())
    per_adapter = 2 * 16 * 4 + 16 + 4
    seq2seq = is_seq2seq(model)
    adapters = {"houlsby": 2 * (2 + 3) if seq2seq else 2 * 2}.get(method, 4 if seq2seq else 2)
    coupling = 2 * (2 * 8 * 4 + 8 + 4) if method == "pfeiffer_invertible" else 0
    assert model.get_nb_trainable_parameters()[0] == adapters * per_adapter + coupling
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("model_type", ["t5", "bart", "gpt2", "llama"])
def test_a_half_precision_model_keeps_its_dtype_beside_float32_adapters(
    model_type: str, method: str, dtype: torch.dtype
):
    model = get_peft_model(base_model(model_type).to(dtype), CONFIGS[method]()).eval()
    assert {p.dtype for p in adapter_weights(model).values()} == {torch.float32}
    randomize(model, 1)
    result = model(**inputs(model))
    assert result.logits.dtype == dtype
    result.loss.backward()
    assert all(p.grad is not None for p in adapter_weights(model).values())


@pytest.mark.parametrize("method", CONFIGS)
def test_a_fresh_adapter_is_close_to_the_identity(method: str):
    base = logits(base_model("llama"))
    exact = get_peft_model(base_model("llama"), CONFIGS[method](init_weights="zero")).eval()
    assert torch.equal(logits(exact), base)
    near = logits(get_peft_model(base_model("llama"), CONFIGS[method](init_weights="normal")).eval())
    assert not torch.equal(near, base)
    torch.testing.assert_close(near, base, atol=0.05, rtol=0)


@pytest.mark.parametrize("method", CONFIGS)
def test_active_adapters_are_stacked_in_order(method: str):
    model = adapted("llama", method)
    model.add_adapter("second", CONFIGS[method]())
    randomize(model, 2, "second")
    model.base_model.set_adapter(["default", "second"])
    forwards = logits(model)
    model.base_model.set_adapter(["second", "default"])
    backwards = logits(model)
    assert torch.allclose(forwards, backwards, atol=1e-5) == (method == "parallel")


def test_a_copied_model_is_independent():
    model = adapted("bart", "pfeiffer_invertible")
    duplicate = copy.deepcopy(model)
    assert torch.equal(logits(duplicate), logits(model))
    randomize(duplicate, 3)
    assert not torch.allclose(logits(duplicate), logits(model), atol=1e-3)


@pytest.mark.parametrize(("options", "size"), [({}, 1), ({"bottleneck_size": 5}, 5), ({"reduction_factor": 100}, 1)])
def test_the_size_of_the_bottleneck(options: dict[str, int], size: int):
    model = get_peft_model(base_model("llama"), HoulsbyAdapterConfig(**options))
    assert {module.bottleneck_adapters["default"].down.out_features for module in layers(model)} == {size}


def layers(model: nn.Module) -> list[BottleneckLayer]:
    return [module for module in model.modules() if isinstance(module, BottleneckLayer)]


def test_dropout_acts_in_training_only():
    model = get_peft_model(base_model("llama"), PfeifferAdapterConfig(dropout=0.5)).train()
    randomize(model, 1)
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("model_type", ["bart", "llama"])
def test_layer_norms_can_be_trained_beside_houlsby_adapters(model_type: str):
    # As Houlsby et al. do.
    norm = {"bart": "final_layer_norm", "llama": "post_attention_layernorm"}[model_type]
    model = get_peft_model(base_model(model_type), HoulsbyAdapterConfig(modules_to_save=[norm]))
    model(**inputs(model)).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained - set(adapter_weights(model)) == {n for n, p in model.named_parameters() if ".modules_to_save." in n}


def test_scaling_multiplies_the_change():
    change = [logits(adapted("gpt2", "parallel", scaling=scaling)) for scaling in (0.0, 1.0)]
    assert torch.equal(change[0], logits(base_model("gpt2")))
    assert not torch.allclose(change[0], change[1], atol=1e-3)
    assert ParallelAdapterConfig().scaling == 4


def test_targets_can_be_chosen():
    attention = get_peft_model(base_model("t5"), HoulsbyAdapterConfig(target_modules=["SelfAttention.o"]))
    assert len(layers(attention)) == 4
    decoder = get_peft_model(base_model("t5"), HoulsbyAdapterConfig(exclude_modules="encoder.*"))
    assert len(layers(decoder)) == 6
    one = get_peft_model(base_model("llama"), PfeifferAdapterConfig(target_modules=r".*layers\.1\.mlp"))
    assert len(layers(one)) == 1


@pytest.mark.parametrize("method", ["pfeiffer", "parallel"])
def test_an_unknown_model_type_works_with_named_modules(method: str, monkeypatch: pytest.MonkeyPatch):
    expected = logits(adapted("mistral", method))
    monkeypatch.delitem(LAYOUTS, "mistral")
    with pytest.raises(ValueError, match="target_modules and input_module must be passed for model_type='mistral'"):
        get_peft_model(base_model("mistral"), CONFIGS[method]())
    options = {"target_modules": ["mlp"], "input_module": "post_attention_layernorm"}
    assert torch.equal(logits(adapted("mistral", method, **options)), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: HoulsbyAdapterConfig(target_modules=["nothing"]), "Target modules .*nothing.* not found"),
        (lambda: HoulsbyAdapterConfig(target_modules=["up_proj"]), "up_proj', the output of which has 32 features"),
        (lambda: PfeifferAdapterConfig(input_module="ln"), "input_module='ln' is not in .* Allowed: self_attn, mlp"),
        (lambda: PfeifferAdapterConfig(norm_module="ln"), "norm_module='ln' is not in"),
        (
            lambda: PfeifferAdapterConfig(invertible=True, target_modules=r".*layers\.1\.mlp"),
            "invertible=True needs exactly one target module in the first layer",
        ),
        (
            lambda: ParallelAdapterConfig(modules_to_save=["post_attention_layernorm"]),
            "holds 'post_attention_layernorm', the input of which adapters read",
        ),
        (lambda: HoulsbyAdapterConfig(reduction_factor=0), "reduction_factor=0 is not valid: it must be at least 1"),
        (lambda: HoulsbyAdapterConfig(bottleneck_size=0), "bottleneck_size=0 is not valid"),
        (lambda: HoulsbyAdapterConfig(dropout=1.0), "dropout=1.0 is not valid"),
        (
            lambda: HoulsbyAdapterConfig(non_linearity="swoosh"),
            "non_linearity='swoosh' is not valid: it must be one of .*swish",
        ),
        (
            lambda: HoulsbyAdapterConfig(init_weights="bert"),
            "init_weights='bert' is not valid: it must be one of normal, zero",
        ),
        (lambda: PfeifferAdapterConfig(invertible_reduction_factor=0), "invertible_reduction_factor=0"),
    ],
)
def test_errors_name_the_option(config: Any, message: str):
    with pytest.raises(ValueError, match=message):
        get_peft_model(base_model("llama"), config())


def test_adapters_of_one_model_read_the_same_input():
    model = adapted("llama", "parallel")
    with pytest.raises(ValueError, match="Adapter 'second' has input_module, norm_module = \\('mlp', None\\)"):
        model.add_adapter("second", ParallelAdapterConfig(input_module="mlp"))


def test_an_input_that_comes_too_late_is_an_error():
    model = adapted("llama", "parallel", target_modules=["input_layernorm"], input_module="mlp")
    with pytest.raises(RuntimeError, match="input_module='mlp' did not run before the target module"):
        logits(model)


@pytest.mark.parametrize("method", CONFIGS)
def test_merging_is_refused_and_leaves_the_model_as_it_is(method: str):
    model = adapted("bart", method)
    expected = logits(model)
    for merge in (model.merge_adapter, model.unmerge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="cannot be merged"):
            merge()
    assert torch.equal(logits(model), expected)


def test_types_are_registered_with_peft(tmp_path: Path):
    for config in (HoulsbyAdapterConfig(), PfeifferAdapterConfig(), ParallelAdapterConfig()):
        config.save_pretrained(tmp_path)
        assert type(PeftConfig.from_pretrained(str(tmp_path))) is type(config)
