"""PEFT's LoRA behaves as PEFT's with the fused pass in it, and what cannot be fused runs PEFT's own and says so."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import nn

from left_trainer.kernels.lora_layers import FusedLinear, use_lora_linear
from tiny import VOCABULARY_SIZE, tiny_model

TARGETS = {"t5": ["q", "v", "wi", "wo"], "gpt2": ["c_attn", "c_proj", "c_fc"]}
# In float64, so that a wrong term cannot pass as rounding.
TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}


def lora_model(model_type: str = "llama", adapters: int = 1, **options: Any) -> PeftModel:
    """A tiny model in float64 whose adapters, unlike new ones, do something."""
    options = {"r": 4, "target_modules": TARGETS.get(model_type, "all-linear"), **options}
    options["fan_in_fan_out"] = model_type == "gpt2"
    model = get_peft_model(tiny_model(model_type).double(), LoraConfig(**options))
    for number in range(1, adapters):
        model.add_adapter(f"other{number}", LoraConfig(**options))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def inputs(model: PeftModel, rows: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY_SIZE, (rows, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def run(model: PeftModel, **arguments: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of what is trained."""
    model.zero_grad()
    torch.manual_seed(5)
    outputs = model(**inputs(model), **arguments)
    if outputs.loss.requires_grad:
        outputs.loss.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return outputs.logits.detach(), gradients


def assert_same(model: PeftModel, do: Callable[[PeftModel], Any] = run) -> dict[str, Any]:
    """`do` gives the same fused and as PEFT has it. Returns what the fused pass counted."""
    use_lora_linear(model, False)
    expected = do(copy.deepcopy(model))
    path = use_lora_linear(model, True)
    torch.testing.assert_close(do(model), expected, **TOLERANCE)
    return path.report()


@pytest.mark.parametrize("model_type", ["t5", "bart", "llama", "gpt2", "opt", "qwen2"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_dropout": 0.3}, {"use_dora": True}], ids=str)
def test_values_and_gradients(options, model_type):
    for training in (False, True):
        report = assert_same(lora_model(model_type, **options).train(training))
        assert report["ran"] > 4
        assert not report["fell_back"]


def test_gradient_checkpointing():
    model = lora_model(lora_dropout=0.3).train()
    model.enable_input_require_grads()
    for reentrant in (True, False):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert not assert_same(model)["fell_back"]


def test_norms_of_dora_follow_every_change_of_the_weights():
    model = lora_model(use_dora=True)
    use_lora_linear(model, True)
    with torch.no_grad():
        first = run(model)[0]
        for name in ("lora_A", "lora_B", "base_layer.weight"):
            for key, parameter in model.named_parameters():
                if name in key:
                    parameter.mul_(1.5)
            path = use_lora_linear(model, False)
            expected = run(model)[0]
            path = use_lora_linear(model, True)
            torch.testing.assert_close(run(model)[0], expected, **TOLERANCE)
            assert path.ran
            assert not torch.allclose(expected, first)


@pytest.mark.parametrize("model_type", ["t5", "llama"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_autocast(use_dora, model_type):
    model = lora_model(model_type, use_dora=use_dora).float()

    def in_bfloat16(model):
        with torch.autocast("cpu", torch.bfloat16):
            return run(model)

    use_lora_linear(model, False)
    exact = run(model)[1]
    plain = in_bfloat16(model)[1]
    path = use_lora_linear(model, True)
    fused = in_bfloat16(model)[1]
    assert path.ran
    assert not path.fell_back
    for name, gradient in exact.items():
        error = float((fused[name] - gradient).norm() / gradient.norm())
        assert error < max(2 * float((plain[name] - gradient).norm() / gradient.norm()), 1e-2), name


def test_a_base_in_bfloat16():
    """PEFT keeps the adapter in float32 and the rest in the dtype of the base."""
    model = get_peft_model(tiny_model("llama").to(torch.bfloat16), LoraConfig(r=4, target_modules="all-linear"))
    expected = run(model)
    path = use_lora_linear(model, True)
    logits, gradients = run(model)
    assert path.ran
    assert logits.dtype == expected[0].dtype == torch.bfloat16
    torch.testing.assert_close(logits, expected[0], rtol=2e-2, atol=2e-2)
    for name, gradient in expected[1].items():
        assert gradients[name].dtype == gradient.dtype == torch.float32
        assert float((gradients[name] - gradient).norm()) <= 2e-2 * float(gradient.norm()) + 1e-8, name


def test_several_adapters_at_once():
    model = lora_model(adapters=3, lora_dropout=0.3).train()
    model.base_model.set_adapter(["default", "other2"])
    assert not assert_same(model)["fell_back"]


def test_changing_the_adapter():
    def each(model):
        results = []
        for name in ("other1", "default"):
            model.set_adapter(name)
            results.append(run(model))
        return results

    assert assert_same(lora_model(adapters=2), each)["ran"]


def test_disabled():
    def disabled(model):
        with model.disable_adapter():
            return run(model)[0], run(model.get_base_model())[0]

    assert_same(lora_model(), disabled)


def test_merged_and_unmerged():
    def merged_and_back(model):
        model.merge_adapter()
        merged = run(model)[0]
        model.unmerge_adapter()
        return merged, run(model)[0]

    assert_same(lora_model(), merged_and_back)
    model = lora_model()
    before = run(model)[0]
    use_lora_linear(model, True)
    torch.testing.assert_close(run(model)[0], before, **TOLERANCE)
    torch.testing.assert_close(run(model.merge_and_unload())[0], before, **TOLERANCE)


def test_an_adapter_for_each_row():
    names = ["default", "other1", "__base__", "other1"]
    report = assert_same(lora_model(adapters=2), lambda model: run(model.eval(), adapter_names=names)[0])
    assert report["ran"] == 0
    assert list(report["fell_back"]) == ["adapters chosen by row or position"]


def test_saved_as_before(tmp_path):
    model = lora_model()
    names = list(model.state_dict())
    use_lora_linear(model, True)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama").double(), tmp_path)
    torch.testing.assert_close(run(loaded)[0], run(model)[0], **TOLERANCE)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_their_own_weights(copied):
    model = lora_model()
    use_lora_linear(model, True)
    before = run(model)[0]
    twin = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(run(twin)[0], before)


def test_switched_off_nothing_is_left_of_it():
    model = lora_model()
    use_lora_linear(model, True)
    assert any(type(module) is FusedLinear for module in model.modules())
    report = use_lora_linear(model, False).report()
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    assert {type(layer) for layer in layers} == {Linear}
    assert report == {"ran": 0, "fell_back": {"use_lora_linear=False": len(layers)}}


def add_hook(model):
    module = next(module for name, module in model.named_modules() if name.endswith("lora_A.default"))
    module.register_forward_hook(lambda module, inputs, output: output * 2)


def train_the_base(model):
    for name, parameter in model.named_parameters():
        if name.endswith("base_layer.weight"):
            parameter.requires_grad_(True)


def two_adapters(model):
    model.base_model.set_adapter(["default", "other1"])


class PackedWeight(torch.Tensor):
    """As torchao has them: a weight that is no plain tensor."""

    def new_empty(self, *args, **kwargs):
        return super().new_empty(*args, **kwargs).as_subclass(PackedWeight)


def pack_weights(model):
    for module in model.modules():
        if isinstance(module, Linear):
            weight = module.base_layer.weight.data.as_subclass(PackedWeight)
            module.base_layer.weight = nn.Parameter(weight, requires_grad=False)


FALLBACKS = {
    "the base weight is a PackedWeight": ({}, pack_weights),
    "DoRA with dropout": ({"use_dora": True, "lora_dropout": 0.3}, nn.Module.train),
    "or beside another adapter": ({"use_dora": True, "adapters": 2}, two_adapters),
    "lora_bias=True": ({"lora_bias": True, "target_modules": ["c_attn"]}, None),
    "has hooks": ({}, add_hook),
    "the base weight is trained": ({}, train_the_base),
    "Embedding is another kind": ({"target_modules": ["embed_tokens"]}, None),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_falls_back(reason):
    options, change = FALLBACKS[reason]
    model = lora_model("gpt2" if "lora_bias" in options else "llama", **options)
    if change:
        change(model)
    report = assert_same(model)
    assert any(reason in found for found in report["fell_back"]), report
