"""Where prompts end, and that a batch of them is continued as each one alone."""

from __future__ import annotations

import pytest
import torch

from left_trainer import list_methods
from left_trainer.adapters.task_ids import task_inputs
from left_trainer.evaluation.generation import generate_completions, split_prompts
from method_settings import apply_or_skip


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
