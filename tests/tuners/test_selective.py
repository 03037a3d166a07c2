"""BitFit, chosen layers and chosen parameter types: the same training as of the base model's own parameters."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    set_seed,
)

from left_trainer.tuners.selective import BitFitConfig, LayersConfig, ParameterTypesConfig, SelectiveLayer
from tiny import ENCODER_DECODER_TYPES, TINY_LLAMA, VOCABULARY_SIZE, tiny_model

FURTHER_TYPES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "init_std": 0.3, "dropout": 0.0},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "mistral": {"num_key_value_heads": 1},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
GENERATIVE_TYPES = (*ENCODER_DECODER_TYPES, "gpt2", "opt", "llama", "qwen2", "qwen3", "mistral")
MODEL_TYPES = (*GENERATIVE_TYPES, "roberta", "bert")
# All linear layers and norms of these have a bias, so that BitFit adds none.
BIASED_TYPES = ("bart", "mbart", "marian", "pegasus", "blenderbot", "gpt2", "opt", "roberta", "bert")
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "bitfit": BitFitConfig,
    "layers": lambda: LayersConfig(layers="last:1"),
    "attention": ParameterTypesConfig,
    "embeddings": lambda: ParameterTypesConfig(types=["embeddings", "norms"]),
    "feed_forward": lambda: ParameterTypesConfig(types=["feed_forward"]),
}


def build(model_type: str, **overrides: Any) -> PreTrainedModel:
    if model_type not in FURTHER_TYPES:
        return tiny_model(model_type, **overrides)
    options = {**TINY_LLAMA, **FURTHER_TYPES[model_type], "vocab_size": VOCABULARY_SIZE, **overrides}
    auto = AutoModelForMaskedLM if model_type in ("roberta", "bert") else AutoModelForCausalLM
    set_seed(0)
    return auto.from_config(AutoConfig.for_model(model_type, **options)).eval()


def batch() -> dict[str, Tensor]:
    tokens = torch.arange(3, 15).reshape(2, 6)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch()).logits


def train(model: nn.Module, steps: int = 1) -> list[float]:
    """Adam's first steps, large enough for a wrong gradient to show. The losses before each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained_values(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """What the adapter holds, by the base model's names."""
    return {
        f"{name}.{parameter}": value
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, SelectiveLayer)
        for parameter, value in layer.trained_parameters(adapter).items()
    }


def noised(model: PeftModel, adapter: str = "default") -> PeftModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in trained_values(model, adapter).values():
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return model


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_adapter_trains_saves_and_loads(model_type: str, config: str, tmp_path: Path) -> None:
    base = build(model_type)
    plain, fresh = deepcopy(base), deepcopy(base)
    before = logits(base)
    model = get_peft_model(base, CONFIGS[config]())
    assert torch.equal(logits(model), before)

    values = trained_values(model)
    start = {name: value.detach().clone() for name, value in values.items()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(value) for value in values.values()}
    losses = train(model, steps=3)

    # Plain fine-tuning of the same parameters; a bias that the model lacks cannot be trained there.
    for parameter in plain.parameters():
        parameter.requires_grad = False
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    if config != "bitfit" or model_type in BIASED_TYPES:
        assert set(values) <= set(parameters)
        for name in values:
            parameters[name].requires_grad = True
        assert train(plain, steps=3) == pytest.approx(losses, abs=1e-6)
        for name, value in values.items():
            torch.testing.assert_close(value, parameters[name], atol=1e-6, rtol=0)
    for name, value in values.items():
        # A bias of the keys moves all scores of a query alike, and softmax does not see that: its gradient is zero.
        key_bias = name.endswith(("k.bias", "k_proj.bias", "key.bias", "k_norm.bias"))
        assert key_bias or not torch.equal(value, start[name]), name
    with model.disable_adapter():
        assert torch.equal(logits(model), before)

    trained = logits(model)
    assert not torch.allclose(trained, before)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == sum(value.numel() for value in values.values())
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path)), trained)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_merging_writes_into_the_base_and_back(model_type: str, config: str, tmp_path: Path) -> None:
    base = build(model_type)
    original = {name: value.clone() for name, value in base.state_dict().items()}
    model = noised(get_peft_model(base, CONFIGS[config]()))
    trained = logits(model)
    if config == "bitfit" and model_type not in BIASED_TYPES:
        with pytest.raises(ValueError, match="cannot be merged with biases it has no place for"):
            model.merge_adapter()
        with pytest.raises(ValueError, match="would lose it"):
            model.merge_and_unload()
        assert not any(layer.merged for layer in model.modules() if isinstance(layer, SelectiveLayer))
        unloaded = model.unload()
    else:
        model.merge_adapter(safe_merge=True)
        assert torch.equal(logits(model), trained)
        model.unmerge_adapter()
        assert torch.equal(logits(model), trained)
        unloaded = deepcopy(model).unload()
        merged = model.merge_and_unload()
        assert torch.equal(logits(merged), trained)
        merged.save_pretrained(tmp_path)
        assert torch.equal(logits(type(merged).from_pretrained(tmp_path).eval()), trained)
    assert unloaded.state_dict().keys() == original.keys()
    assert all(torch.equal(value, original[name]) for name, value in unloaded.state_dict().items())


@pytest.mark.parametrize("model_type", ["t5", "gpt2"])
@pytest.mark.parametrize("config", CONFIGS)
def test_adapters_share_a_model(model_type: str, config: str, tmp_path: Path) -> None:
    base = build(model_type)
    before = logits(base)
    model = noised(get_peft_model(base, CONFIGS[config]()))
    first = logits(model)
    model.add_adapter("second", LayersConfig(layers="first:1") if config == "layers" else CONFIGS[config]())
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), before)
    second = logits(noised(model, "second"))
    wanted = {id(value) for value in trained_values(model, "second").values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == wanted

    model.save_pretrained(tmp_path, selected_adapters=["second"])
    loaded = PeftModel.from_pretrained(
        build(model_type), tmp_path / "second", is_trainable=True, low_cpu_mem_usage=True
    )
    assert torch.equal(logits(loaded), second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="Activate one of them"):
        model.base_model.set_adapter(["default", "second"])
    if config != "bitfit" or model_type in BIASED_TYPES:
        model.merge_adapter()
        with pytest.raises(ValueError, match="cannot be merged together"):
            model.merge_adapter(["second"])
        with model.disable_adapter():
            assert torch.equal(logits(model), before)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter default was active which is now deleted")
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert torch.equal(logits(model), second)
    assert not trained_values(model)


@pytest.mark.parametrize("model_type", ["t5", "gpt2"])
@pytest.mark.parametrize("config", CONFIGS)
def test_gradient_checkpointing_changes_nothing(model_type: str, config: str) -> None:
    models = [get_peft_model(build(model_type), CONFIGS[config]()).train() for _ in range(2)]
    models[1].enable_input_require_grads()
    models[1].gradient_checkpointing_enable({"use_reentrant": False})
    for model in models:
        model(**batch()).loss.backward()
    for one, other in zip(trained_values(models[0]).values(), trained_values(models[1]).values(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("model_type", GENERATIVE_TYPES)
@pytest.mark.parametrize("config", CONFIGS)
def test_generation_sees_the_adapter(model_type: str, config: str) -> None:
    model = noised(get_peft_model(build(model_type), CONFIGS[config]()))
    inputs = {"input_ids": batch()["input_ids"], "attention_mask": batch()["attention_mask"]}
    tokens = [model.generate(**inputs, max_new_tokens=4, use_cache=cache, do_sample=False) for cache in (True, False)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("model_type", ["t5", "mt5", "bart", "gpt2", "qwen3"])
@pytest.mark.parametrize("config", CONFIGS)
def test_half_precision_keeps_the_models_dtype(model_type: str, config: str, tmp_path: Path) -> None:
    model = get_peft_model(build(model_type).to(torch.bfloat16), CONFIGS[config]())
    assert all(value.dtype == torch.float32 for value in trained_values(model).values())
    train(model)
    trained = logits(model)
    assert trained.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build(model_type).to(torch.bfloat16), tmp_path)), trained)
    if config != "bitfit" or model_type in BIASED_TYPES:
        assert torch.equal(logits(model.merge_and_unload()), trained)


@pytest.mark.parametrize("model_type", ["t5", "bart", "gpt2", "qwen3", "roberta"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_model_without_weights_can_be_counted(model_type: str, config: str) -> None:
    with torch.device("meta"):
        model = get_peft_model(build(model_type), CONFIGS[config]())
    assert all(value.is_meta for value in trained_values(model).values())
    expected = get_peft_model(build(model_type), CONFIGS[config]()).get_nb_trainable_parameters()
    assert model.get_nb_trainable_parameters() == expected


def test_bitfit_trains_what_its_paper_counts() -> None:
    """0.08% of BERT-large; every block has 11 x 1,024 biases, the embeddings' norm and the pooler one more each."""
    config = AutoConfig.for_model(
        "bert", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    with torch.device("meta"):
        model = get_peft_model(AutoModel.from_config(config), BitFitConfig())
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 24 * 11 * 1024 + 2 * 1024
    assert round(100 * trainable / (total - trainable), 2) == 0.08


def test_bitfit_leaves_a_new_classifier_to_peft(tmp_path: Path) -> None:
    options = {**TINY_LLAMA, "vocab_size": VOCABULARY_SIZE, "num_labels": 3}
    base = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("roberta", **options)).eval()
    plain = deepcopy(base)
    model = get_peft_model(base, BitFitConfig(task_type="SEQ_CLS"))
    assert not any("classifier" in name for name in trained_values(model))
    inputs = {"input_ids": batch()["input_ids"]}
    noised(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
        trained = model(**inputs).logits
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(plain, tmp_path)(**inputs).logits, trained)


def test_bitfit_adds_biases_except_to_the_head() -> None:
    values = trained_values(get_peft_model(build("qwen3"), BitFitConfig()))
    assert "lm_head.bias" not in values
    assert values["model.layers.0.mlp.down_proj.bias"].shape == (16,)
    assert values["model.layers.0.self_attn.q_norm.bias"].shape == (8,)
    assert values["model.norm.bias"].abs().sum() == 0


@pytest.mark.parametrize(
    ("layers", "stack", "expected"),
    [
        ("last:2", "both", {"encoder": {2, 3}, "decoder": {1, 2}}),
        ("first:1", "both", {"encoder": {0}, "decoder": {0}}),
        ("last:25%", "both", {"encoder": {3}, "decoder": {2}}),
        ("last:50%", "encoder", {"encoder": {2, 3}}),
        ("0,2", "decoder", {"decoder": {0, 2}}),
        ([1], "both", {"encoder": {1}, "decoder": {1}}),
        (0, "decoder", {"decoder": {0}}),
    ],
)
def test_blocks_are_counted_in_each_stack(layers: Any, stack: str, expected: dict[str, set[int]]) -> None:
    base = tiny_model("t5", num_layers=4, num_decoder_layers=3)
    model = get_peft_model(base, LayersConfig(layers=layers, stack=stack))
    found: dict[str, set[int]] = {}
    for name in trained_values(model):
        part, _, index, *_ = name.split(".")
        found.setdefault(part, set()).add(int(index))
    assert found == expected


def test_every_parameter_type_is_told_apart() -> None:
    def names(model_type: str, kind: str) -> set[str]:
        values = trained_values(get_peft_model(build(model_type), ParameterTypesConfig(types=[kind])))
        return {name.rpartition(".layers.1.")[2] for name in values if ".layers.0." not in name}

    assert names("llama", "query") == {"self_attn.q_proj.weight"}
    assert names("llama", "output") == {"self_attn.o_proj.weight"}
    assert names("llama", "feed_forward") == {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert names("llama", "norms") == {"input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight"}
    assert names("llama", "embeddings") == {"model.embed_tokens.weight"}
    assert names("marian", "embeddings") == {"model.shared.weight"}  # its table of sines stays
    assert names("opt", "value") == {"self_attn.v_proj.weight", "self_attn.v_proj.bias"}
    roberta = names("roberta", "output")
    assert {name.partition("layer.1.")[2] for name in roberta} >= {"attention.output.dense.weight"}
    assert not any("intermediate" in name or "LayerNorm" in name or "layer.1.output" in name for name in roberta)


@pytest.mark.parametrize("model_type", ["t5", "bart", "gpt2", "opt"])
def test_tied_embeddings_stay_tied(model_type: str) -> None:
    model = noised(get_peft_model(build(model_type), ParameterTypesConfig(types=["embeddings"])))
    base = model.get_base_model()
    assert torch.equal(base.get_input_embeddings().weight, base.get_output_embeddings().weight)
    merged = model.merge_and_unload()
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert merged.config.tie_word_embeddings


def test_target_modules_restrict_the_selection() -> None:
    model = get_peft_model(build("bart"), BitFitConfig(target_modules=["q_proj", "fc2"]))
    assert {name.split(".")[-2] for name in trained_values(model)} == {"q_proj", "fc2"}
    model = get_peft_model(build("bart"), ParameterTypesConfig(target_modules=r".*decoder.*encoder_attn.*"))
    assert all("encoder_attn" in name for name in trained_values(model))
    # Qwen2 has some biases: where only they are trained, the adapter merges.
    model = noised(get_peft_model(build("qwen2"), BitFitConfig(target_modules=["q_proj"])))
    trained = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), trained)


def test_configs_read_as_written(tmp_path: Path) -> None:
    model = get_peft_model(build("t5"), LayersConfig(layers=[0], stack="decoder"))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LAYERS"
    assert (saved["layers"], saved["stack"], saved["target_modules"]) == ([0], "decoder", None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: ParameterTypesConfig(types=["atention"]), "Did you mean 'attention'"),
        (lambda: ParameterTypesConfig(types="norm"), "Did you mean 'norms'"),
        (lambda: ParameterTypesConfig(types=[]), r"types=\[\] is empty"),
        (lambda: LayersConfig(layers="lst:2"), "Did you mean 'last'"),
        (lambda: LayersConfig(layers="last:0"), "does not say which"),
        (lambda: LayersConfig(layers=[-1]), "does not say which"),
        (lambda: LayersConfig(layers=[]), "does not say which"),
        (lambda: LayersConfig(stack="encoders"), "Did you mean 'encoder'"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_there(config: Callable[[], PeftConfig], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config()


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("t5", LayersConfig(layers="last:3"), "the encoder has 2 blocks, 0 to 1"),
        ("llama", LayersConfig(layers="0,2"), "the model has 2 blocks, 0 to 1"),
        ("llama", LayersConfig(stack="encoder"), "not an encoder-decoder model"),
        ("gpt2", ParameterTypesConfig(types=["query"]), "no parameters of type 'query' of their own"),
        ("bart", BitFitConfig(target_modules=["nothing"]), "leaves no parameter"),
    ],
)
def test_what_a_model_lacks_is_refused(model_type: str, config: PeftConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(build(model_type), config)


def test_a_parameter_that_cannot_be_replaced_is_refused() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.bias = nn.Parameter(torch.zeros(4))

    with pytest.raises(ValueError, match="cannot be replaced"):
        get_peft_model(nn.Sequential(Gated()), BitFitConfig())
    quantized = nn.Sequential(nn.Linear(4, 4))
    quantized[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    blocks = nn.Module()
    blocks.layers = nn.ModuleList([quantized])
    with pytest.raises(ValueError, match="without quantization"):
        get_peft_model(blocks, LayersConfig())
