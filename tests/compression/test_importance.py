"""What parts of a model do, measured by hooks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from left_trainer.compression.architecture import ARCHITECTURES, architecture_of
from left_trainer.compression.importance import BLOCK_INFLUENCE, FIRST_ORDER, MAGNITUDE, RANDOM, importances
from left_trainer.compression.sizes import size_of
from left_trainer.kernels.lora_layers import use_lora_linear
from left_trainer.methods.apply import apply_method
from left_trainer.models import without_adapter
from tiny import tiny_model

KINDS = (BLOCK_INFLUENCE, FIRST_ORDER, MAGNITUDE, RANDOM)


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch, use_cache=False).loss * batch["labels"].ne(-100).sum()


def batches(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rows in (2, 3):
        ids = torch.randint(3, 300, (rows, 7), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        ids[mask == 0] = 0
        labels = ids.masked_fill(mask == 0, -100)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_part_has_an_importance(model_type):
    model = tiny_model(model_type, dropout=0.5).train()
    state = torch.get_rng_state()
    found = importances(model, KINDS, batches(), loss_of, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    size, blocks = size_of(model.config), list(architecture_of(model.config).blocks(model.config))
    for kind, scores in found.items():
        assert {name: len(values) for name, values in scores.layers.items()} == size.layers
        assert all((values > 0).all() for values in scores.layers.values())
        if kind == BLOCK_INFLUENCE:
            continue
        assert {name: len(values) for name, values in scores.neurons.items()} == {
            block.feed_forward: size.ffn[block.stack] for block in blocks
        }
        heads = {} if size.heads is None else {name: size.heads for block in blocks for name in block.attentions}
        assert {name: len(values) for name, values in scores.heads.items()} == heads
        assert all(
            (values >= 0).all() and values.sum() > 0 for values in (*scores.neurons.values(), *scores.heads.values())
        )
    again = importances(model, KINDS, batches(), loss_of, seed=0)
    for kind in KINDS:
        torch.testing.assert_close(again[kind].neurons, found[kind].neurons, rtol=0, atol=0)


def test_the_importance_of_a_neuron_is_the_gradient_of_its_gate():
    """Of one token, where the sum over tokens has one term: against the change of the loss by finite differences."""
    model = tiny_model("llama").double()
    batch = {"input_ids": torch.tensor([[5, 9]]), "labels": torch.tensor([[-100, 9]])}
    found = importances(model, [FIRST_ORDER], [batch], loss_of, seed=0)[FIRST_ORDER]
    # In the last block only the first position has a gradient: the second one predicts nothing.
    down, epsilon = model.model.layers[1].mlp.down_proj, 0.02  # the loss is computed in float32
    for neuron in (0, 7):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                weight = down.weight[:, neuron].clone()
                down.weight[:, neuron] *= 1 + sign * epsilon
                losses.append(loss_of(model, batch).item())
                down.weight[:, neuron] = weight
        slope = abs(losses[0] - losses[1]) / (2 * epsilon)
        assert found.neurons["model.layers.1.mlp"][neuron].item() == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_a_frozen_base_has_the_importances_of_the_plain_model(model_type):
    """A new adapter changes nothing; its base has no gradients, and its layers a forward pass of their own."""
    expected = importances(tiny_model(model_type), [BLOCK_INFLUENCE, FIRST_ORDER], batches(), loss_of, seed=0)
    model = apply_method(tiny_model(model_type), "lora", {"target_modules": "all-linear"}, seed=0)
    use_lora_linear(model, True)
    before = {name: weight.requires_grad for name, weight in model.named_parameters()}
    found = importances(model, [BLOCK_INFLUENCE, FIRST_ORDER], batches(), loss_of, seed=0)
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == before
    for kind, scores in expected.items():
        for part in ("layers", "neurons", "heads"):
            torch.testing.assert_close(getattr(found[kind], part), getattr(scores, part), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["houlsby_adapter", "prefix_tuning", "prompt_tuning"])
@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_other_adapters_stand_around_the_parts(model_type, method):
    options = {"num_virtual_tokens": 3} if "adapter" not in method else {}
    model = apply_method(tiny_model(model_type), method, options, seed=0)
    found = importances(model, KINDS, batches(), loss_of, seed=0)
    assert set(found[FIRST_ORDER].neurons) == set(found[MAGNITUDE].neurons)


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_padding_has_no_influence(model_type):
    model = tiny_model(model_type)
    short = batches()[0]
    longer = {
        name: nn.functional.pad(value, (0, 5), value=-100 if name == "labels" else 0) for name, value in short.items()
    }
    expected, found = (
        importances(model, [BLOCK_INFLUENCE, FIRST_ORDER], [batch], loss_of, seed=0) for batch in (short, longer)
    )
    for kind in (BLOCK_INFLUENCE, FIRST_ORDER):
        torch.testing.assert_close(found[kind].layers, expected[kind].layers, rtol=1e-4, atol=1e-6)


def test_a_block_that_adds_nothing_has_no_importance():
    model = tiny_model("llama")
    with torch.no_grad():
        for linear in (model.model.layers[1].mlp.down_proj, model.model.layers[1].self_attn.o_proj):
            linear.weight.zero_()
    found = importances(model, KINDS, batches(), loss_of, seed=0)
    for kind in (BLOCK_INFLUENCE, FIRST_ORDER):
        assert found[kind].layers["decoder"][1] == pytest.approx(0, abs=1e-6)
        assert found[kind].layers["decoder"][0] > 0.01
    assert found[MAGNITUDE].heads["model.layers.1.self_attn"].sum() == 0


def test_magnitude_is_of_the_base_weights():
    model = apply_method(tiny_model("gpt2"), "lora", seed=0)
    found = importances(model, [MAGNITUDE], [], loss_of, seed=0)[MAGNITUDE]
    weight = without_adapter(model).transformer.h[0].mlp.c_proj.weight  # inputs are rows
    torch.testing.assert_close(found.neurons["transformer.h.0.mlp"], weight.detach().double().norm(dim=1))


def test_random_importances_are_those_of_the_seed():
    model = tiny_model("t5")
    first, again, other = (importances(model, [RANDOM], [], loss_of, seed=seed)[RANDOM] for seed in (0, 0, 1))
    torch.testing.assert_close(first.layers, again.layers, rtol=0, atol=0)
    assert not torch.equal(first.layers["encoder"], other.layers["encoder"])
