"""Using what a training saved: generation, and the model to merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from left_trainer.adapters.task_ids import task_inputs
from left_trainer.evaluation.generation import generate_completions
from left_trainer.evaluation.text_metrics import decode
from left_trainer.methods import get_method
from left_trainer.methods.apply import method_name
from left_trainer.methods.registry import METHODS
from left_trainer.methods.saving import load_trained
from left_trainer.models import ModelSource, is_adapter_directory, load_tokenizer, without_adapter
from left_trainer.models.languages import generate_in_target_language


class Generator:
    """Answers prompts with a fine-tuned model, greedily or by beam search.

    Args:
        path: Folder of an adapter or of a whole model.
        num_beams: 1 is greedy.
        max_new_tokens: Length limit of an answer in tokens.
        device: By default the accelerator if there is one.
    """

    def __init__(
        self, path: str, num_beams: int = 1, max_new_tokens: int = 128, device: torch.device | str | None = None
    ) -> None:
        source = ModelSource.of(path)
        self.family = source.family
        self.tokenizer = load_tokenizer(source)
        self.model = load_trained(source, is_trainable=False)
        prepare_for_use(self.model)
        if self.family == "encoder_decoder":
            generate_in_target_language(without_adapter(self.model), self.tokenizer)
        self.model.to(device or torch.accelerator.current_accelerator() or "cpu").eval()
        self.arguments = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "do_sample": False}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """The answer to each prompt."""
        device = self.model.device
        if self.family == "encoder_decoder":
            batch = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(device)
            batch.pop("token_type_ids", None)
            batch.update(task_inputs(self.model, len(prompts)))
            return decode(self.tokenizer, self.model.generate(**batch, **self.arguments).cpu().numpy())
        rows = [torch.tensor(ids, device=device) for ids in self.tokenizer(list(prompts))["input_ids"]]
        tokens = generate_completions(self.model, rows, self.tokenizer.pad_token_id, **self.arguments)
        return decode(self.tokenizer, tokens.cpu().numpy())


def prepare_for_use(model: PreTrainedModel | PeftModel) -> None:
    """Run what the method of a loaded adapter needs for its model to compute as in training."""
    if isinstance(model, PeftModel):
        method = METHODS.find(method_name(model.active_peft_config))
        if method and method.prepare:
            method.prepare(model)


def load_for_merge(path: str) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The adapter on its base model, and the tokenizer.

    Raises:
        ValueError: The folder holds no adapter, or one of a method that cannot be merged.
    """
    if not is_adapter_directory(path):
        raise ValueError(f"{path!r} holds no adapter (no adapter_config.json), so there is nothing to merge.")
    source = ModelSource.of(path)
    name = method_name(source.adapter)
    if not get_method(name).mergeable:
        raise ValueError(
            f"{path!r} was trained with {name}, which adds inputs and not weights, so it cannot be merged. Serve it as "
            "an adapter: PeftModel.from_pretrained(base, path)."
        )
    return load_trained(source, is_trainable=False), load_tokenizer(source)
