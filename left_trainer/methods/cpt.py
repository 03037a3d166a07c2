"""Context-aware prompt tuning: a training example as prompt, refined within a small ball."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import CPTConfig, PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from left_trainer.adapters.prompt_encoder import PROMPT_ENCODER
from left_trainer.methods.input_prompts import derive_input_prompt, prepare_input_prompt
from left_trainer.methods.limits import NO_PACKING
from left_trainer.methods.method import PeftMethod
from left_trainer.methods.virtual_tokens import VirtualTokens
from left_trainer.models import unwrapped
from left_trainer.token_mean import IGNORE_INDEX

MAX_CPT_TOKENS = 32
# CPT's names for the parts of its initial prompt: 2 is the input of an example, 4 its answer.
CPT_INPUT, CPT_ANSWER = 2, 4


def first_example(tokenizer: PreTrainedTokenizerBase, row: list[int]) -> dict[str, Any]:
    """CPT's initial prompt: the first training row, its last token taken for the answer."""
    ids = row[-MAX_CPT_TOKENS:]
    types = [CPT_INPUT] * (len(ids) - 1) + [CPT_ANSWER]
    return {"cpt_token_ids": ids, "cpt_mask": [1] * len(ids), "cpt_tokens_type_mask": types}


def context_length(options: Mapping[str, Any]) -> int:
    """How many tokens the context has, or may have where it is yet to be taken from the data."""
    ids = options.get("cpt_token_ids")
    return MAX_CPT_TOKENS if ids is None else len(ids)


def context_loss(
    model: PeftModel, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None, ranks: int
) -> tuple[torch.Tensor, Any]:
    r"""CPT's loss, over the answers in the context too: $\sum_i w_i \ell_i / N$ with $N$ target tokens.

    PEFT's is the mean over a micro-batch, which accumulation would sum. In evaluation it is the mean over the targets
    of the rows alone, as it is for every other method.
    """
    labels = inputs["labels"]
    if num_items_in_batch is None:
        outputs = model(**inputs)
        if outputs.logits.shape[1] == labels.shape[1]:  # the adapter is off, and no context stands before the rows
            labels = labels[:, 1:]
        logits = outputs.logits[:, -labels.shape[1] - 1 : -1]
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX), outputs
    config, is_own = unwrapped(model).active_peft_config, labels.ne(IGNORE_INDEX).any(dim=1)
    in_context = sum(kind % 4 == 0 for kind in config.cpt_tokens_type_mask[1:])
    num_labels = labels.ne(IGNORE_INDEX).sum() + in_context * is_own.sum()
    if is_own.any() and not is_own.all():  # the others fill up the last batch, and their context does not count either
        inputs = {name: tensor[is_own] for name, tensor in inputs.items()}
    outputs = model(**inputs)
    return outputs.loss * num_labels / num_items_in_batch * ranks, outputs


CPT = PeftMethod(
    name="cpt",
    family="soft_prompt",
    summary="a training example as prompt, its embeddings refined within a small ball",
    paper="Blau et al., 2024, arXiv 2410.17222",
    config_class=CPTConfig,
    narrow_learning_rate=1e-3,
    learning_rate=1e-3,
    learning_rate_source="that of prompt_tuning",
    equation=r"X' = [E_{\mathrm{ctx}} + \delta; X], \quad \lVert \delta_i \rVert \le \epsilon",
    when_to_use="Few-shot learning: the context is real text that may move only a little, against overfitting.",
    derive=derive_input_prompt,
    derive_from_data=first_example,
    prepare=prepare_input_prompt,
    loss=context_loss,
    virtual_tokens=VirtualTokens("input", count=context_length),
    training_state=PROMPT_ENCODER,
    required={
        "cpt_token_ids": "the token ids of the context, with cpt_mask and cpt_tokens_type_mask of the same length. "
        "LeftTrainer takes them from the first row of train_dataset."
    },
    unsupported={
        **NO_PACKING,
        "encoder_decoder": "its loss is defined over one sequence of context and input.",
    },
    aliases=("context_aware_prompt_tuning",),
)
