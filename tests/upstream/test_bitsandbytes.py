"""What bitsandbytes still does wrong, and which of its undocumented names left_trainer uses."""

from __future__ import annotations

import contextlib
import inspect
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.loftq_utils import replace_lora_weights_loftq
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from left_trainer.kernels.lora_linear import unpacked
from package_walk import home
from tiny import tiny_model

bitsandbytes = pytest.importorskip("bitsandbytes")

from bitsandbytes.functional import dequantize_4bit, has_avx512bf16  # noqa: E402
from bitsandbytes.nn import Linear4bit, Linear8bitLt  # noqa: E402

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture
def quantized(tmp_path):
    """A LoRA with alpha = 2r on a 4-bit model, and the folder of the unquantized one."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 2, "num_hidden_layers": 1}
    tiny_model("llama", **shape).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NF4, device_map="cpu")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj"])
    return get_peft_model(model, config), tmp_path


def layer() -> Linear4bit:
    made = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    made.load_state_dict({"weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))})
    return made.to("cpu")


@pytest.mark.skipif(not has_avx512bf16(), reason="the kernel that repacks needs a CPU with AVX512-BF16")
def test_an_evaluation_takes_the_gradients_of_a_4_bit_layer_away():
    evaluated = layer().eval()
    with torch.no_grad():
        evaluated(torch.randn(2, 64))
    x = torch.randn(2, 64, requires_grad=True)
    with contextlib.suppress(RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluated.train()(x).sum().backward()
    assert x.grad is None or not x.grad.any(), (
        f"bitsandbytes now keeps the gradients of repacked layers: remove {home('keep_unpacked')}."
    )


def test_a_4_bit_layer_has_what_we_read():
    made = layer()
    what = f"which {home('keep_unpacked')} and {home('_why_not_this_4bit_base')} read"
    for name in ("support_avx512bf16_for_cpu", "compute_type_is_set", "compute_dtype"):
        assert hasattr(made, name), f"bitsandbytes' Linear4bit has no {name} any more, {what}."
    source = inspect.getsource(bitsandbytes.nn.modules)
    assert "packing_format_for_cpu" in source, f"bitsandbytes has no packing_format_for_cpu any more, {what}."
    assert made.weight.quant_state is not None, f"bitsandbytes' weights have no quant_state any more, {what}."
    assert dequantize_4bit(made.weight, made.weight.quant_state).shape == (64, 64), (
        f"bitsandbytes' dequantize_4bit gives another shape, which {home('unpacked')} uses."
    )


@pytest.mark.parametrize("is_training", [False, True])
def test_an_8_bit_layer_has_what_we_read(is_training):
    made = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=6.0)
    made.load_state_dict({"weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))})
    made = made.to("cpu").train(is_training)
    what = f"which {home('_weight_of')} reads"
    assert made.weight.SCB is not None, f"bitsandbytes' 8-bit weights have no SCB before the first call, {what}."
    x = torch.randn(3, 64, requires_grad=True)
    made(x).sum().backward()
    assert made.state.SCB is not None, f"bitsandbytes' 8-bit layers have no state.SCB any more, {what}."
    assert made.weight.dtype == torch.int8, f"bitsandbytes' 8-bit layers keep another weight, {what}."
    expected = torch.ones(3, 64) @ unpacked(made.weight.data, made.state.SCB, torch.float32)
    assert torch.equal(x.grad, expected), f"bitsandbytes unpacks 8-bit weights otherwise than {home('unpacked')}."


def test_loftq_needs_an_accelerator_or_leaves_the_scaling_out(quantized):
    model, folder = quantized
    if torch.cuda.is_available():
        model.cuda()
    try:
        replace_lora_weights_loftq(model, str(folder))
    except (AssertionError, RuntimeError):
        if torch.cuda.is_available():
            raise
        return
    q_proj = model.base_model.model.model.layers[0].self_attn.q_proj
    original = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].self_attn.q_proj.weight
    base = dequantize_4bit(q_proj.weight.data, q_proj.weight.quant_state).cpu()
    change = (q_proj.lora_B["default"].weight @ q_proj.lora_A["default"].weight * q_proj.scaling["default"]).cpu()
    assert (original - base - change).norm() > (original - base).norm(), (
        f"peft's replace_lora_weights_loftq now runs on a CPU and scales: call it in {home('initialize_loftq')}."
    )


def test_a_missing_kernel_is_logged_at_import():
    source = inspect.getsource(bitsandbytes.backends.cpu.ops)
    assert "Failed to load CPU gemm_4bit_forward" in source, (
        "bitsandbytes no longer logs that a kernel of the hub is missing: remove the logger's level from "
        f"{home('register_with_peft')}."
    )


def test_weights_on_disk_are_found_by_their_names_in_the_model(quantized):
    from peft.utils.loftq_utils import _SafetensorLoader

    model, folder = quantized
    name = "model.layers.0.self_attn.q_proj.weight"
    original = AutoModelForCausalLM.from_pretrained(folder).get_parameter(name)
    assert torch.equal(_SafetensorLoader(model, str(folder)).get_tensor(name), original), (
        f"peft's _SafetensorLoader reads weights differently now, which {home('initialize_loftq')} uses."
    )
