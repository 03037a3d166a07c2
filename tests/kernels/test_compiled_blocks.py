"""Compiled blocks say what the blocks say, are compiled once for all layers, and count what ran in them."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import PreTrainedModel

from left_trainer.kernels.compiled_blocks import (
    CACHED,
    NO_BLOCKS,
    REDRAWN,
    REPLACED,
    is_compiled,
    repeated_blocks,
    use_compiled_blocks,
)
from left_trainer.kernels.fast_paths import COMPILED_BLOCKS, GELU, LORA_LINEAR, FastPath
from left_trainer.kernels.gelu import use_fused_gelu
from left_trainer.kernels.lora_layers import use_lora_linear
from left_trainer.models import without_adapter
from tiny import tiny_model

# torch hides the warning that it reads the gradient of a block's input, but not where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

SHAPES = ((4, 10), (4, 12))  # rows and tokens: torch compiles for the first, and then for any length
EAGER = {"backend": "eager"}
LAYERS = {
    "t5": ("num_layers", "num_decoder_layers"),
    "bart": ("encoder_layers", "decoder_layers"),
    "llama": ("num_hidden_layers",),
    "gpt2": ("num_hidden_layers",),
    "gemma": ("num_hidden_layers",),
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def prepared(model_type: str, lora: bool, **overrides: int) -> tuple[nn.Module, dict[str, FastPath]]:
    """A model in training, and its fast paths."""
    model: nn.Module = tiny_model(model_type, dropout=0.1, **overrides)
    paths: dict[str, FastPath] = defaultdict(FastPath)
    if lora:
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["q_proj", "down_proj"], r=2, lora_dropout=0.1, init_lora_weights=False)
        model = get_peft_model(model, config)
    paths[LORA_LINEAR], paths[GELU] = use_lora_linear(model, True), use_fused_gelu(model, True)
    return model.train(), paths


def results(model: nn.Module, shapes: tuple[tuple[int, int], ...] = SHAPES) -> list[float]:
    """Losses, and sums of the gradients up to them."""
    found = []
    for index, shape in enumerate(shapes):
        torch.manual_seed(index)
        ids = torch.randint(3, 300, shape)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False).loss
        loss.backward()
        sums = [weight.grad.double().abs().sum() for weight in model.parameters() if weight.grad is not None]
        found += [loss.item(), torch.stack(sums).sum().item()]
    return found


def counts(paths: dict[str, FastPath]) -> dict[str, dict]:
    return {name: path.report() for name, path in paths.items() if name != COMPILED_BLOCKS}


def graphs_of(model_type: str, lora: bool, layers: dict[str, int]) -> int:
    """Number of graphs that are compiled for a model in which equals hold between compiled and plain blocks."""
    torch.compiler.reset()
    shapes = SHAPES[: len(SHAPES) // len(layers)]  # an encoder-decoder model has blocks of more forms
    model, paths = prepared(model_type, lora, **layers)
    expected = results(model, shapes)
    as_counted = counts(paths)
    model, paths = prepared(model_type, lora, **layers)
    counter = CompileCounter()
    use_compiled_blocks(model, {"backend": counter}, paths)
    assert results(model, shapes) == pytest.approx(expected, rel=1e-5)
    assert counts(paths) == as_counted
    n_blocks = len(list(repeated_blocks(model)))
    assert n_blocks == sum(layers.values())
    assert paths[COMPILED_BLOCKS].report() == {"ran": n_blocks * len(shapes), "fell_back": {}}
    return counter.frame_count


@pytest.mark.parametrize("model_type", LAYERS)
def test_layers_are_compiled_together(model_type):
    # An input without a gradient is a form of its own, and so are T5's blocks that make the position bias.
    few, many = (
        graphs_of(model_type, model_type == "llama", dict.fromkeys(LAYERS[model_type], number)) for number in (2, 3)
    )
    assert few == many


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_checkpointed_blocks(model_type):
    found = []
    for options in (None, {"backend": "aot_eager"}):
        model, paths = prepared(model_type, lora=model_type == "llama")
        without_adapter(model).gradient_checkpointing_enable({"use_reentrant": False})
        without_adapter(model).enable_input_require_grads()
        use_compiled_blocks(model, options, paths)
        found.append(results(model, SHAPES[:1]))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert not paths[COMPILED_BLOCKS].fell_back


def test_a_backend_that_draws_other_masks_in_the_backward_pass_compiles_no_checkpointed_block():
    model, paths = prepared("llama", lora=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    use_compiled_blocks(model, EAGER, paths)
    results(model, SHAPES[:1])
    assert paths[COMPILED_BLOCKS].report() == {"ran": 0, "fell_back": {REDRAWN: 2}}


def test_models_of_a_class_share_what_is_compiled():
    counter = CompileCounter()
    for _ in range(2):
        model, paths = prepared("gemma", lora=False)
        use_compiled_blocks(model, {"backend": counter}, paths)
        results(model, SHAPES[:1])
        assert paths[COMPILED_BLOCKS].ran == 2
    assert counter.frame_count == 1


def test_a_block_with_a_cache_runs_as_it_is():
    model, paths = prepared("llama", lora=False)
    use_compiled_blocks(model, EAGER, paths)
    model.eval().generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert paths[COMPILED_BLOCKS].report() == {"ran": 0, "fell_back": {CACHED: 6}}


def test_a_class_of_blocks_with_too_many_forms_runs_as_it_is(monkeypatch):
    monkeypatch.setattr("left_trainer.kernels.compiled_blocks.MAX_FORMS", 1)
    model, paths = prepared("gpt2", lora=False)
    use_compiled_blocks(model, EAGER, paths)
    results(model)
    assert paths[COMPILED_BLOCKS].ran == 2
    ((reason, number),) = paths[COMPILED_BLOCKS].fell_back.items()
    assert reason == "GPT2Block has more forms than torch.compile makes in a process"
    assert number == 2


class Branching(nn.Module):
    """torch cannot compile what depends on a value as a whole."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(x) if x.sum() > 0 else self.plain(x) + 0


class Looping(nn.Module):
    """Nor over a number of them, as Switch Transformers' experts do."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in x.flatten().gt(0).nonzero():
            x = x + 0 * index
        return self.plain(x)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Branching, "Detected data-dependent branching"),
        (Looping, "Could not extract specialized integer from data-dependent expression u0"),
    ],
)
def test_blocks_that_cannot_be_compiled_run_as_they_are(kind, why, caplog):
    expected = results(prepared("llama", lora=True)[0])
    model, paths = prepared("llama", lora=True)
    for block in repeated_blocks(model):
        block.mlp = kind(block.mlp)
    use_compiled_blocks(model, EAGER, paths)
    assert results(model) == pytest.approx(expected, rel=1e-5)
    reason = f"torch cannot compile LlamaDecoderLayer: {why}"
    assert paths[COMPILED_BLOCKS].report() == {"ran": 0, "fell_back": {reason: 4}}
    assert paths[LORA_LINEAR].ran == 2 * 4  # of a graph that was not finished, nothing is counted
    assert len([record for record in caplog.records if reason in record.message]) == 1


def test_blocks_of_several_classes_in_a_list_are_compiled():
    found = []
    for options in (None, EAGER):
        model, paths = prepared("llama", lora=False)
        model.model.layers[0].__class__ = type("OtherLayer", (type(model.model.layers[0]),), {})
        use_compiled_blocks(model, options, paths)
        found.append(results(model, SHAPES[:1]))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert paths[COMPILED_BLOCKS].report() == {"ran": 2, "fell_back": {}}


def test_a_model_without_blocks_says_so():
    paths: dict[str, FastPath] = defaultdict(FastPath)
    use_compiled_blocks(nn.Sequential(nn.Linear(2, 2)), EAGER, paths)  # type: ignore[arg-type]
    assert paths[COMPILED_BLOCKS].report() == {"ran": 0, "fell_back": {NO_BLOCKS: 1}}


def test_a_block_whose_forward_is_replaced_is_left_alone():
    model, paths = prepared("gpt2", lora=False)
    first, second = repeated_blocks(model)
    first.forward = forward = first.forward
    use_compiled_blocks(model, EAGER, paths)
    assert first.forward is forward
    assert is_compiled(second)
    assert paths[COMPILED_BLOCKS].report() == {"ran": 0, "fell_back": {REPLACED: 1}}


def test_blocks_are_copied_stored_and_taken_out_as_before():
    model: PreTrainedModel = tiny_model("llama")
    names = list(model.state_dict())
    use_compiled_blocks(model, EAGER, defaultdict(FastPath))
    assert list(model.state_dict()) == names
    expected = results(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.zero_()
    for other in (copied, pickle.loads(pickle.dumps(copied))):
        other.zero_grad()
        assert results(other) == pytest.approx(expected, rel=1e-6)
    assert results(model) != pytest.approx(expected, rel=1e-6)
    use_compiled_blocks(copied, None, defaultdict(FastPath))
    assert not any("forward" in vars(block) for block in repeated_blocks(copied))
