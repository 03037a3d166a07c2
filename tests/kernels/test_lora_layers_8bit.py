"""LoRA on a base that bitsandbytes has quantized to 8 bits: PEFT's values and gradients, and its own product."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig

from left_trainer.kernels.lora_layers import use_lora_linear
from left_trainer.models import auto_class, model_family
from tiny import VOCABULARY_SIZE, tiny_model

pytest.importorskip("bitsandbytes")
TARGETS = {"t5": ["q", "v", "wi", "wo"], "opt": ["q_proj", "v_proj", "fc1"], "led": ["query", "value", "fc1"]}
pytestmark = pytest.mark.filterwarnings("ignore:.*will be cast from.*float16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("8bit")


def lora_model(folder, model_type="llama", dtype=torch.float32, adapters=1, **options):
    path = folder / model_type
    if not path.exists():
        tiny_model(model_type).save_pretrained(path)
    model = auto_class(model_family(tiny_model(model_type))).from_pretrained(
        path, quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=dtype, device_map="cpu"
    )
    config = LoraConfig(**{"r": 4, "target_modules": TARGETS.get(model_type, "all-linear"), **options})
    model = get_peft_model(model, config)
    for number in range(1, adapters):
        model.add_adapter(f"other{number}", config)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def run(model, fused):
    """Logits, gradients of what is trained, and what the fused pass counted."""
    model, path = copy.deepcopy(model), None
    path = use_lora_linear(model, fused)
    ids = torch.randint(3, VOCABULARY_SIZE, (4, 9), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    outputs = model(input_ids=ids, labels=ids)
    if outputs.loss.requires_grad:
        outputs.loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return outputs.logits.detach(), gradients, path.report()


def assert_same(model, tolerance=1e-5):
    expected, found = run(model, False), run(model, True)
    assert torch.dist(found[0], expected[0]) <= tolerance * expected[0].norm()
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert found[1][name].dtype == gradient.dtype
        assert torch.dist(found[1][name], gradient) <= tolerance * gradient.norm() + 1e-9, name
    return found[2]


@pytest.mark.parametrize("model_type", ["llama", "opt", "t5", "led"])  # OPT has biases; LED divides what it is given
def test_values_and_gradients(model_type, folder):
    for is_training in (True, False):  # on a CPU bitsandbytes unpacks the weight for the one and not for the other
        model = lora_model(folder, model_type).train(is_training)
        report = assert_same(model)
        assert report["ran"] > 4
        assert not report["fell_back"]
    with torch.no_grad():
        assert assert_same(model)["ran"] > 4


def test_dropout_and_several_adapters(folder):
    model = lora_model(folder, adapters=2, lora_dropout=0.3).train()
    model.base_model.set_adapter(["default", "other1"])
    assert not assert_same(model)["fell_back"]


def test_gradient_checkpointing(folder):
    model = lora_model(folder).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    assert not assert_same(model)["fell_back"]


def through_a_layer(model, fused, autocast=False):
    """Output and gradients of one layer in bfloat16, what it keeps of its input in bytes, and the report."""
    model = copy.deepcopy(model)
    path = use_lora_linear(model, fused)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.gate_proj")
    x = torch.randn(64, 16, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.square().sum().backward()
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    tensors = [y.detach(), x.grad, *(weight.grad for weight in weights)]
    return tensors, sum(tensor.nbytes for tensor in kept.values() if tensor.shape == x.shape), path.report()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("is_training", [False, True])
def test_a_layer_in_bfloat16_keeps_its_input_once(is_training, autocast, folder):
    """PEFT keeps it in the adapter's float32 too, or casts what it kept of it for autocast."""
    model = lora_model(folder, dtype=torch.bfloat16).train(is_training)
    plain, plain_bytes, _ = through_a_layer(model, False, autocast)
    fused, fused_bytes, report = through_a_layer(model, True, autocast)
    assert report["ran"] == 1
    assert fused_bytes == 64 * 16 * 2
    assert plain_bytes == (1 if autocast else 2) * fused_bytes
    for expected, found in zip(plain, fused, strict=True):
        assert found.dtype == expected.dtype
        assert torch.dist(found.float(), expected.float()) <= 1e-2 * expected.float().norm()


def test_dora_falls_back(folder):
    report = assert_same(lora_model(folder, use_dora=True).train())
    assert set(report["fell_back"]) == {"DoRA on a base in 8 bits"}


def test_autocast_to_another_dtype_falls_back(folder):
    model = lora_model(folder).train()
    with torch.autocast("cpu", torch.bfloat16):
        report = run(model, True)[2]
    assert set(report["fell_back"]) == {"autocast changes the dtype of an 8-bit layer"}
