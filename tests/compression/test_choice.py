"""Which parts stay."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from left_trainer.compression.architecture import ARCHITECTURES, architecture_of
from left_trainer.compression.choice import best_parts, composed, relative, size_between, sizes_down_to
from left_trainer.compression.importance import RANDOM, Scores, importances
from left_trainer.compression.removal import kept_whole, remove_parts
from left_trainer.compression.sizes import Size, counted_parameters, parameters_at, possible_heads, size_of
from tiny import tiny_model


def scores_of(model, seed: int = 0) -> Scores:
    return importances(model, [RANDOM], [], None, seed=seed)[RANDOM]


def larger(model_type: str):
    """With enough of everything."""
    names = {"heads": ("num_heads", "num_attention_heads", "num_key_value_heads")}
    config = tiny_model(model_type).config
    heads = {name: 4 for name in names["heads"] if hasattr(config, name)} if size_of(config).heads is not None else {}
    fields = {stack.layers_field: 3 for stack in architecture_of(config).stacks}
    return tiny_model(model_type, **fields, **heads)


@pytest.mark.parametrize("share", [0.75, 0.5, 0.3])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_share_of_the_parameters_is_met_closely(model_type, share):
    model = larger(model_type)
    whole = counted_parameters(model)
    path = sizes_down_to(model.config, scores_of(model), int(share * whole))
    for size, parameters in path:
        assert parameters == parameters_at(model.config, size)
        assert min(size.layers.values()) >= 1
        assert min(size.ffn.values()) >= 1
        assert size.heads is None or size.heads in possible_heads(model.config)
    counts = [whole, *(parameters for _, parameters in path)]
    assert counts == sorted(counts, reverse=True)
    assert share - 0.08 <= counts[-1] / whole <= share
    size = path[-1][0]
    remove_parts(model, best_parts(model.config, size, scores_of(model), scores_of(model)))
    assert size_of(model.config) == size
    assert counted_parameters(model) == counts[-1]


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_the_best_parts_stay(model_type):
    model = larger(model_type)
    whole, scores = size_of(model.config), scores_of(model)
    fewer_heads = possible_heads(model.config)[-2]
    size = Size(dict.fromkeys(whole.layers, 2), dict.fromkeys(whole.ffn, 5), fewer_heads)
    kept = best_parts(model.config, size, scores, scores)
    for name, values in scores.layers.items():
        assert kept.layers[name] == tuple(sorted(values.argsort(descending=True)[:2].tolist()))
    staying = [
        block for block in architecture_of(model.config).blocks(model.config) if block.index in kept.layers[block.stack]
    ]
    assert set(kept.neurons) == {block.feed_forward for block in staying}
    for name, indices in kept.neurons.items():
        assert indices.tolist() == sorted(scores.neurons[name].argsort(descending=True)[:5].tolist())
    for names in architecture_of(model.config).equal_heads(model.config):
        present = [name for name in names if name in kept.heads]
        total = sum(scores.heads[name] for name in present)
        for name in present:
            assert kept.heads[name].tolist() == sorted(total.argsort(descending=True)[:fewer_heads].tolist())


def test_a_dear_unit_stays_while_a_cheap_one_is_there():
    model = larger("llama")
    scores = scores_of(model)
    cheap = dataclasses.replace(scores, neurons={name: values * 1e-6 for name, values in scores.neurons.items()})
    size = sizes_down_to(model.config, cheap, int(0.8 * counted_parameters(model)))[-1][0]
    assert size.layers == size_of(model.config).layers
    cheap = dataclasses.replace(scores, layers={name: values * 1e-6 for name, values in scores.layers.items()})
    size = sizes_down_to(model.config, cheap, int(0.6 * counted_parameters(model)))[-1][0]
    assert size.layers == {"decoder": 2}


@pytest.mark.parametrize("model_type", ["t5", "bart", "llama"])
def test_sizes_between_two_end_at_the_last(model_type):
    config = larger(model_type).config
    first = size_of(config)
    last = Size(dict.fromkeys(first.layers, 1), dict.fromkeys(first.ffn, 3), None if first.heads is None else 1)
    sizes = [size_between(config, first, last, progress / 10) for progress in range(11)]
    assert sizes[0] == first
    assert sizes[-1] == last
    for before, after in itertools.pairwise(sizes):
        assert all(after.layers[name] <= number for name, number in before.layers.items())
        assert all(after.ffn[name] <= width for name, width in before.ffn.items())


@pytest.mark.parametrize("model_type", ["t5", "bart", "llama", "opt"])
def test_removals_one_after_the_other_are_one(model_type):
    step_by_step, at_once, from_first = (larger(model_type) for _ in range(3))
    config, done = at_once.config, None
    states = []
    for seed, share in ((1, 0.7), (2, 0.4)):
        scores = scores_of(step_by_step, seed)
        now = step_by_step.config
        size = sizes_down_to(now, scores, int(share * counted_parameters(from_first)))[-1][0]
        kept = best_parts(now, size, scores, scores)
        done = composed(done, kept, config)
        states.append(done)
        remove_parts(step_by_step, kept)
    original = from_first.config.to_dict()
    remove_parts(at_once, done)
    assert at_once.config.to_dict() == step_by_step.config.to_dict() != original
    whole = larger(model_type).config
    remove_parts(from_first, states[0])
    remove_parts(from_first, relative(states[1], states[0], whole))
    for other in (at_once, from_first):
        torch.testing.assert_close(other.state_dict(), step_by_step.state_dict(), rtol=0, atol=0)


def test_what_is_gone_does_not_come_back():
    model = larger("llama")
    whole = kept_whole(model)
    smaller = dataclasses.replace(whole, layers={"decoder": (0, 1)})
    with pytest.raises(ValueError, match="gone"):
        relative(whole, smaller, model.config)
