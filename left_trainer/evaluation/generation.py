"""Continuing the prompts of decoder-only models, in batches, with any adapter."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from left_trainer.adapters.residual_base import original_base
from left_trainer.adapters.task_ids import TASK_IDS, task_inputs
from left_trainer.callbacks.step_timer import synchronize
from left_trainer.methods.apply import find_method
from left_trainer.token_mean import IGNORE_INDEX


class GenerationSpeed:
    """Rows per second of generation alone: without the loss, the metrics and, where there are others, the first batch.

    `rows_per_second` is `None` before anything was generated.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[int, float]] = []

    @contextlib.contextmanager
    def measure(self, rows: int) -> Iterator[None]:
        """Time what runs inside, which generates `rows` rows."""
        synchronize()
        began = time.perf_counter()
        yield
        synchronize()
        self._batches.append((rows, time.perf_counter() - began))

    @property
    def rows_per_second(self) -> float | None:
        timed = self._batches[1:] or self._batches
        return sum(rows for rows, _ in timed) / sum(seconds for _, seconds in timed) if timed else None


def split_prompts(inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The prompt of each row of a training batch: everything before the first label that is not -100.

    Args:
        inputs: `input_ids`, `labels` and optionally `attention_mask`, each `(batch, sequence)`.

    Raises:
        ValueError: A row whose labels cover the whole sequence, so that there is no prompt to continue.
    """
    ids, labels = inputs["input_ids"], inputs["labels"]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    lengths = labels.ne(IGNORE_INDEX).int().argmax(dim=1)
    if bool((lengths == 0).any()):
        raise ValueError(
            "predict_with_generate=True needs to know where each prompt ends, and a row of the evaluation data has no "
            "prompt: its labels cover the whole text. Pass prompt/completion rows, or set predict_with_generate=False."
        )
    return [row[:length][keep[:length]] for row, keep, length in zip(ids, mask, lengths.tolist(), strict=True)]


@contextlib.contextmanager
def adapter_disabled(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Inside, `model` computes and generates as its base model does. Does nothing for a model without an adapter.

    PEFT's `disable_adapter` leaves `generate` of encoder-decoder models with a soft prompt as it is (peft 0.21), so it
    is replaced here too.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    with model.disable_adapter(), original_base(model):
        generate = model.get_base_model().generate
        # The base model knows nothing of the tasks that the adapter tells apart.
        model.generate = lambda **kwargs: generate(**{name: kwargs[name] for name in kwargs if name != TASK_IDS})
        try:
            yield
        finally:
            del model.generate


def generate_completions(
    model: PreTrainedModel | PeftModel, prompts: list[torch.Tensor], pad_token_id: int, **arguments: Any
) -> torch.Tensor:
    """Generate what follows each prompt.

    Prompts are padded on the left. Virtual tokens go between the padding and the prompt: PEFT puts them before the
    padding and drops the position ids that would make up for it, so that models with absolute positions (GPT-2) give
    a prompt-tuned row another continuation in a batch than alone (peft 0.21).

    Args:
        model: A decoder-only model, with or without an adapter.
        prompts: Token ids, each `(prompt length,)`.
        pad_token_id: Fills rows.
        arguments: For `generate`.

    Returns:
        New token ids, `(batch, longest completion)`, without the prompts.
    """
    if _puts_tokens_before_input(model):
        virtual = model.get_prompt(batch_size=1, **task_inputs(model, 1))[0]
        rows = [torch.cat([virtual, model.word_embeddings(prompt).to(virtual.dtype)]) for prompt in prompts]
        rows = [row.to(model.base_model_torch_dtype or row.dtype) for row in rows]
        return model.get_base_model().generate(
            inputs_embeds=pad_sequence(rows, batch_first=True, padding_side="left"),
            attention_mask=_left_mask(rows),
            pad_token_id=pad_token_id,
            **arguments,
        )
    ids = pad_sequence(prompts, batch_first=True, padding_value=pad_token_id, padding_side="left")
    tasks = task_inputs(model, len(prompts) * int(arguments.get("num_beams") or 1))
    tokens = model.generate(
        input_ids=ids, attention_mask=_left_mask(prompts), pad_token_id=pad_token_id, **tasks, **arguments
    )
    return tokens[:, ids.shape[1] :]


def _puts_tokens_before_input(model: PreTrainedModel | PeftModel) -> bool:
    """Whether virtual tokens stand before the input, and the adapter is not disabled."""
    if not isinstance(model, PeftModel) or "generate" in vars(model):
        return False
    method = find_method(model)
    return method is not None and method.virtual_tokens is not None and method.virtual_tokens.place == "input"


def _left_mask(rows: list[torch.Tensor]) -> torch.Tensor:
    masks = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows]
    return pad_sequence(masks, batch_first=True, padding_side="left")


def generation_arguments(
    max_new_tokens: int | None, num_beams: int | None, given: Mapping[str, object]
) -> dict[str, object]:
    """Arguments for `generate`: those given for this call, else those of the training arguments."""
    arguments = {key: value for key, value in given.items() if value is not None}
    if "max_length" not in arguments and "max_new_tokens" not in arguments and max_new_tokens is not None:
        arguments["max_new_tokens"] = max_new_tokens
    if "num_beams" not in arguments and num_beams is not None:
        arguments["num_beams"] = num_beams
    return arguments


def scored_generation_config(own: GenerationConfig, arguments: Mapping[str, Any]) -> GenerationConfig:
    """The config that gives, by itself, what `generate(**arguments)` gives on a model whose config is `own`.

    Objects among the arguments that no config can hold, such as a `logits_processor`, are left out.
    """
    config = copy.deepcopy(arguments.get("generation_config") or own)
    fields = {name: value for name, value in arguments.items() if hasattr(config, name)}
    if fields.get("max_new_tokens") is not None:
        fields = {"max_length": None, **fields}
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def write_generation_config(config: GenerationConfig, directory: str | Path) -> None:
    """Write `generation_config.json`.

    Not by `save_pretrained`, which refuses a config with a setting that has no effect, such as `early_stopping` of a
    model whose beams the user has switched off.
    """
    config.to_json_file(Path(directory) / GENERATION_CONFIG_NAME, use_diff=True)


def read_generation_config(directory: str | Path) -> GenerationConfig | None:
    """What `generation_config.json` in `directory` holds; `None` where there is none."""
    if not (Path(directory) / GENERATION_CONFIG_NAME).is_file():
        return None
    return GenerationConfig.from_pretrained(str(directory))
