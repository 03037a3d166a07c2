"""Where prompts end, and that a batch of them is continued as each one alone."""

from __future__ import annotations

import pytest
import torch

from left_trainer import list_methods
from left_trainer.adapters.task_ids import task_inputs
from left_trainer.evaluation.generation import (
    generate_completions,
    room_for_prompt,
    split_prompts,
    why_not_batched,
)
from method_settings import apply_or_skip
from tiny import DECODER_ONLY_TYPES, tiny_model


def test_a_row_without_a_prompt_is_refused():
    labels = torch.tensor([[5, 6, 7], [-100, 6, 7]])
    with pytest.raises(ValueError, match="has no prompt"):
        split_prompts({"input_ids": labels.clamp(min=3), "labels": labels})


def test_prompts_end_where_labels_begin():
    ids = torch.tensor([[9, 5, 6, 7, 0], [0, 4, 8, 3, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, 6, 7, -100], [-100, -100, -100, 3, 1]])
    prompts = split_prompts({"input_ids": ids, "attention_mask": mask, "labels": labels})
    assert [prompt.tolist() for prompt in prompts] == [[9, 5], [4, 8]]


PROMPTS = [torch.tensor(ids) for ids in ([5, 6, 7, 8, 9, 10, 11], [40, 41], [12, 13, 14], [50, 9, 60])]
READS_PADDING = {"repetition_penalty": 2.5, "no_repeat_ngram_size": 1, "min_length": 9, "max_length": 10}


def moved(model, scale=0.3):
    """Further from where all positions look alike: some types begin with weights close to 0."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


def continued(model, prompts=PROMPTS, **arguments):
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **arguments}
    return generate_completions(model, prompts, pad_token_id=0, **options).tolist()


def alone(model, **arguments):
    return [row for prompt in PROMPTS for row in continued(model, [prompt], **arguments)]


@pytest.mark.parametrize("model_type", [*DECODER_ONLY_TYPES, "recurrent_gemma"])
def test_a_row_of_a_batch_is_the_row_alone(model_type):
    model = moved(tiny_model(model_type))
    assert continued(model) == alone(model)
    if model_type != "rwkv":  # whose state transformers cannot reorder
        assert continued(model, num_beams=2) == alone(model, num_beams=2)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_positions_that_depend_on_the_longest_row_keep_rows_apart(kind):
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 8}
    model = moved(tiny_model("llama", rope_parameters=rope, max_position_embeddings=8 if kind == "dynamic" else 64))
    assert why_not_batched(model, 8) is None
    assert "more than 8 tokens" in why_not_batched(model, 9)
    assert continued(model) == alone(model)


def test_a_method_that_mixes_rows_keeps_them_apart(tmp_path):
    model = apply_or_skip("lily", "llama", tmp_path, seed=0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    assert why_not_batched(model, 0) == "lily mixes the rows of a batch"
    assert continued(model) == alone(model)


@pytest.mark.parametrize("setting", READS_PADDING)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_settings_that_read_the_prompt_do_not_read_its_padding(model_type, setting):
    """In a batch, the padding would count as tokens that were seen, or as part of a length."""
    model = moved(tiny_model(model_type))
    model.generation_config.update(**{setting: READS_PADDING[setting]}, eos_token_id=1)
    limit = {} if setting == "max_length" else {"max_new_tokens": 9}
    together = generate_completions(model, PROMPTS, pad_token_id=1, **limit)
    for row, prompt in zip(together, PROMPTS, strict=True):
        single = generate_completions(model, [prompt], pad_token_id=1, **limit)[0]
        assert row[: len(single)].tolist() == single.tolist()
        assert not row[len(single) :].ne(1).any()


def test_several_sequences_of_a_prompt_follow_each_other():
    model = moved(tiny_model("llama"))
    arguments = {"num_beams": 3, "num_return_sequences": 3, "repetition_penalty": 1.5}
    assert continued(model, **arguments) == alone(model, **arguments)


def test_a_prompt_that_is_too_long_keeps_its_end():
    ids = torch.tensor([[2, 5, 6, 7, 8, 0, 0], [2, 5, 9, 1, 0, 0, 0]])
    labels = torch.tensor([[-100] * 7, [-100, -100, 9, 1, -100, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0]])
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    found = [split_prompts(inputs, room, bos) for room, bos in ((None, 2), (3, 2), (3, None), (1, 2))]
    assert [[row.tolist() for row in rows] for rows in found] == [
        [[2, 5, 6, 7, 8], [2, 5]],  # without a target, a row is a prompt
        [[2, 7, 8], [2, 5]],
        [[6, 7, 8], [2, 5]],
        [[8], [5]],
    ]


def test_a_model_without_room_for_a_prompt_is_named():
    with pytest.raises(ValueError, match=r"max_new_tokens=128 .* 128 positions"):
        room_for_prompt(tiny_model("gpt2"), 128)
    assert room_for_prompt(tiny_model("gpt2"), 100) == 28
    assert room_for_prompt(tiny_model("bloom"), 1000) is None


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [method.name for method in list_methods() if method.family == "soft_prompt"])
def test_a_prompt_is_continued_in_a_batch_as_alone(method, model_type, tmp_path):
    """GPT-2 with prompt tuning is where PEFT's own generation differs: positions counted through the padding."""
    model = apply_or_skip(method, model_type, tmp_path, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.eval()
    prompts = [torch.tensor([5, 6, 7, 8, 9, 10, 11]), torch.tensor([40, 41]), torch.tensor([12, 13, 14])]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = generate_completions(model, prompts, pad_token_id=0, **options)
    assert together.shape == (3, 6)
    for row, prompt in zip(together, prompts, strict=True):
        alone = generate_completions(model, [prompt], pad_token_id=0, **options)[0]
        assert row.tolist() == alone.tolist()
        tokens = prompt[None]
        for _ in range(6):  # and as the model's forward pass says
            with torch.no_grad():
                tasks = task_inputs(model, 1)
                logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **tasks).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        assert alone.tolist() == tokens[0, -6:].tolist()
