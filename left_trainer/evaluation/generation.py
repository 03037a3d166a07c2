"""Continuing the prompts of decoder-only models, in batches, with any adapter."""

from __future__ import annotations

import contextlib
import copy
import inspect
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from left_trainer.adapters.residual_base import original_base
from left_trainer.adapters.task_ids import TASK_IDS, task_inputs
from left_trainer.callbacks.step_timer import synchronize
from left_trainer.methods.apply import find_method
from left_trainer.models import without_adapter
from left_trainer.models.positions import position_limits, rotary_switch
from left_trainer.models.wrapping import gather_outer, reshard
from left_trainer.token_mean import IGNORE_INDEX

DEFAULT_MAX_NEW_TOKENS = 128
# Model types whose text changes with the batch, mask or not.
ROW_BY_ROW = {
    "recurrent_gemma": "its convolutions and its state take in the padding",
    "rwkv": "its state takes in the padding and, from the second new token on, other rows",
    "xlnet": "its segments and relative positions count the padding",
}
# Settings of generation that count or read the tokens of a prompt, its padding included, with the value that is none.
NEUTRAL: dict[str, Any] = {
    "max_length": None,
    "min_length": 0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "sequence_bias": None,
    "bad_words_ids": None,
}
OF_THE_USER = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")  # who knows what they read


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


def split_prompts(
    inputs: Mapping[str, torch.Tensor], room: int | None = None, bos_token_id: int | None = None
) -> list[torch.Tensor]:
    """The prompt of each row of a training batch: everything before the first label that is not -100.

    Args:
        inputs: `input_ids` and optionally `labels` and `attention_mask`, each `(batch, sequence)`. A row without a
            target is a prompt as it is.
        room: Tokens that a prompt may have. Of a longer one the end is kept, where a template asks for the answer,
            behind the token that begins it.
        bos_token_id: Of the tokenizer.

    Raises:
        ValueError: A row whose labels cover the whole sequence, so that there is no prompt to continue.
    """
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    is_target = inputs.get("labels", torch.full_like(ids, IGNORE_INDEX)).ne(IGNORE_INDEX)
    lengths = torch.where(is_target.any(dim=1), is_target.int().argmax(dim=1), ids.shape[1])
    rows = [row[:length][keep[:length]] for row, keep, length in zip(ids, mask, lengths.tolist(), strict=True)]
    if not all(map(len, rows)):
        raise ValueError(
            "predict_with_generate=True needs to know where each prompt ends, and a row of the evaluation data has no "
            "prompt: its labels cover the whole text. Pass prompt/completion rows, or set predict_with_generate=False."
        )
    return rows if room is None else [end_of_prompt(row, room, bos_token_id) for row in rows]


def end_of_prompt(prompt: torch.Tensor, room: int, bos_token_id: int | None) -> torch.Tensor:
    """The last `room` tokens of `prompt`, of which the first is the one that begins a text where the prompt has it."""
    if len(prompt) <= room:
        return prompt
    begins = int(room > 1 and int(prompt[0]) == bos_token_id)
    return torch.cat([prompt[:begins], prompt[len(prompt) - room + begins :]])


def positions_for_text(model: PreTrainedModel | PeftModel) -> int | None:
    """Positions that a decoder-only model has beside virtual tokens; `None` where it sets no limit."""
    positions = position_limits(without_adapter(model).config, with_rotary=True).source
    return None if positions is None else positions - _positions_of_adapter(model)


def room_for_prompt(model: PreTrainedModel | PeftModel, max_new_tokens: int | None) -> int | None:
    """Tokens that a prompt may have beside new and virtual tokens; `None` where the model sets no limit.

    Args:
        model: A decoder-only one.
        max_new_tokens: What there has to be room for; `None` where another limit ends the text: for one token.

    Raises:
        ValueError: There is no room for a prompt.
    """
    positions = positions_for_text(model)
    room = None if positions is None else positions - (max_new_tokens or 1)
    if room is not None and room < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} (generation_max_length) leaves no room for a prompt: the model has "
            f"{positions} positions for text. Lower it."
        )
    return room


def _positions_of_adapter(model: PreTrainedModel | PeftModel) -> int:
    method = find_method(model) if _is_adapted(model) else None
    return method.positions(vars(model.active_peft_config), "decoder_only").source if method else 0


@contextlib.contextmanager
def adapter_disabled(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Inside, `model` computes and generates as its base model does. Does nothing for a model without an adapter.

    PEFT's `disable_adapter` leaves `generate` of encoder-decoder models with a soft prompt as it is (peft 0.21), so it
    is replaced here too.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    own = vars(model).get("generate")  # FSDP2 has put one there
    reshard(model)  # so that what is changed below are the weights, and no copies of them
    with model.disable_adapter(), original_base(model):
        generate = model.get_base_model().generate

        def generate_as_base(**kwargs: Any) -> Any:
            gather_outer(model)
            # The base model knows nothing of the tasks that the adapter tells apart.
            return generate(**{name: kwargs[name] for name in kwargs if name != TASK_IDS})

        model.generate, model.adapter_is_off = generate_as_base, True
        gather_outer(model)  # the base may be called on its own
        try:
            yield
        finally:
            del model.generate, model.adapter_is_off
            if own is not None:
                model.generate = own
            reshard(model)


def generate_completions(
    model: PreTrainedModel | PeftModel, prompts: list[torch.Tensor], pad_token_id: int, **arguments: Any
) -> torch.Tensor:
    """Generate what follows each prompt: for a prompt in a batch the same as for the prompt alone.

    Prompts are padded on the left, unless that would change the text (see `reads_whole_prompts` and
    `why_not_batched`): then prompts of equal length go together, or each one alone.

    Args:
        model: A decoder-only model, with or without an adapter.
        prompts: Token ids, each `(prompt length,)`.
        pad_token_id: Fills rows.
        arguments: For `generate`.

    Returns:
        New token ids, `(batch, longest completion)`, without the prompts; with `num_return_sequences` those of a
        prompt follow each other.
    """
    groups = _unpadded_groups(model, prompts, arguments)
    if groups is None:
        return _generate_padded(model, prompts, pad_token_id, arguments)
    rows: dict[int, torch.Tensor] = {}
    for group in groups:
        tokens = _generate_padded(model, [prompts[index] for index in group], pad_token_id, arguments)
        rows.update(zip(group, tokens.unflatten(0, (len(group), -1)), strict=True))
    longest = max(row.shape[1] for row in rows.values())
    padded = [pad(rows[index], (0, longest - rows[index].shape[1]), value=pad_token_id) for index in sorted(rows)]
    return torch.cat(padded)


def _unpadded_groups(
    model: PreTrainedModel | PeftModel, prompts: list[torch.Tensor], arguments: Mapping[str, Any]
) -> list[list[int]] | None:
    """Positions of the prompts that are generated for together, without padding; `None` where all can be padded."""
    longest = max(map(len, prompts)) + int(generation_setting(model, arguments, "max_new_tokens") or 0)
    goes_alone = why_not_batched(model, longest) is not None
    is_padded = len({len(prompt) for prompt in prompts}) > 1
    reads_padding = is_padded and reads_whole_prompts(model, arguments) is not None
    if not goes_alone and not reads_padding:
        return None
    # With synced_gpus each process has to call the model as often as the others.
    if goes_alone or arguments.get("synced_gpus"):
        return [[index] for index in range(len(prompts))]
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    return list(by_length.values())


def why_not_batched(model: PreTrainedModel | PeftModel, longest: int) -> str | None:
    """Why prompts in a batch would change what `model` writes; `None` where padding and other rows do not matter.

    Args:
        model: A decoder-only model, with or without an adapter.
        longest: Tokens of the longest row, the new ones included.
    """
    base, switch = without_adapter(model), rotary_switch(without_adapter(model).config)
    if base.config.model_type in ROW_BY_ROW:
        return ROW_BY_ROW[base.config.model_type]
    if not {"attention_mask", "kwargs"} & set(inspect.signature(base.forward).parameters):
        return f"{type(base).__name__} takes no attention_mask"
    if switch is not None and longest > switch:
        return f"rotary positions of all rows change where one has more than {switch} tokens"
    return why_rows_are_mixed(model)


def why_rows_are_mixed(model: PreTrainedModel | PeftModel) -> str | None:
    """The method whose adapter makes what a row is given depend on the others of its batch; `None` without one."""
    method = find_method(model) if _is_adapted(model) else None
    return f"{method.name} mixes the rows of a batch" if method and method.mixes_rows else None


def reads_whole_prompts(model: PreTrainedModel | PeftModel, arguments: Mapping[str, Any]) -> str | None:
    """The setting of generation that reads a prompt together with its padding; `None` where there is none.

    Args:
        model: That generates.
        arguments: For `generate`.
    """
    given = next((name for name in OF_THE_USER if arguments.get(name)), None)
    has_limit = generation_setting(model, arguments, "max_new_tokens")
    names = [name for name in NEUTRAL if not (name == "max_length" and has_limit)]
    values = {name: generation_setting(model, arguments, name) for name in names}
    return given or next((name for name, value in values.items() if value not in (None, NEUTRAL[name])), None)


def generation_setting(model: PreTrainedModel | PeftModel, arguments: Mapping[str, Any], name: str) -> Any:
    """A setting as `generate` decides it: its arguments, the `generation_config` among them, then the model's own."""
    places = (arguments.get("generation_config"), model.generation_config)
    values = [arguments.get(name), *(getattr(config, name, None) for config in places if config is not None)]
    return next((value for value in values if value is not None), None)


def _generate_padded(
    model: PreTrainedModel | PeftModel, prompts: list[torch.Tensor], pad_token_id: int, arguments: Mapping[str, Any]
) -> torch.Tensor:
    """Generate for all prompts in one batch, padded on the left.

    Virtual tokens go between the padding and the prompt: PEFT puts them before the padding and drops the position ids
    that would make up for it, so that models with absolute positions (GPT-2) give a prompt-tuned row another
    continuation in a batch than alone (peft 0.21).
    """
    if _puts_tokens_before_input(model):
        gather_outer(model)
        virtual = model.get_prompt(batch_size=1, **task_inputs(model, 1))[0]
        rows = [torch.cat([virtual, model.word_embeddings(prompt).to(virtual.dtype)]) for prompt in prompts]
        rows = [row.to(model.base_model_torch_dtype or row.dtype) for row in rows]
        outputs = model.get_base_model().generate(
            inputs_embeds=pad_sequence(rows, batch_first=True, padding_side="left"),
            attention_mask=_left_mask(rows),
            pad_token_id=pad_token_id,
            **arguments,
        )
        return generated_ids(outputs)
    ids = pad_sequence(prompts, batch_first=True, padding_value=pad_token_id, padding_side="left")
    num_beams = generation_setting(model, arguments, "num_beams") or 1
    tasks = task_inputs(model, len(prompts) * int(num_beams))
    outputs = model.generate(
        input_ids=ids, attention_mask=_left_mask(prompts), pad_token_id=pad_token_id, **tasks, **arguments
    )
    return generated_ids(outputs)[:, ids.shape[1] :]


def generated_ids(outputs: Any) -> torch.Tensor:
    """Token ids of what `generate` returned, also with `return_dict_in_generate=True`."""
    ids: torch.Tensor = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
    return ids


def _is_adapted(model: PreTrainedModel | PeftModel) -> bool:
    """Whether `model` has an adapter that is not disabled."""
    return isinstance(model, PeftModel) and not getattr(model, "adapter_is_off", False)


def _puts_tokens_before_input(model: PreTrainedModel | PeftModel) -> bool:
    """Whether virtual tokens stand before the input, and the adapter is not disabled."""
    method = find_method(model) if _is_adapted(model) else None
    return method is not None and method.virtual_tokens is not None and method.virtual_tokens.place == "input"


def _left_mask(rows: list[torch.Tensor]) -> torch.Tensor:
    masks = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows]
    return pad_sequence(masks, batch_first=True, padding_side="left")


def generation_arguments(
    model: PreTrainedModel | PeftModel, max_new_tokens: int | None, num_beams: int | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments for `generate`: those given for this call, else those of the training arguments, else the model's own.

    Args:
        model: The limit on the length in its own generation config, or in that of the call, stands where the user sets
            none. Without any, 128 new tokens are the limit, or half of a decoder-only model's positions where that is
            less; `generate` would stop after 20.
        max_new_tokens: `generation_max_length`.
        num_beams: `generation_num_beams`.
        given: For this call. What is `None` is not given, as in `Seq2SeqTrainer`.
    """
    arguments = {key: value for key, value in given.items() if value is not None}
    added: dict[str, Any] = {}
    limits = ("max_new_tokens", "max_length")
    if not any(name in arguments for name in limits):
        has_limit = any(generation_setting(model, arguments, name) is not None for name in limits)
        added["max_new_tokens"] = max_new_tokens or (None if has_limit else _default_limit(model))
    if "num_beams" not in arguments:
        added["num_beams"] = num_beams
    added = {key: value for key, value in added.items() if value is not None}
    if "generation_config" not in arguments:
        return arguments | added
    config = copy.deepcopy(arguments["generation_config"])  # beside which `generate` wants no other settings
    config.update(**added)
    return arguments | {"generation_config": config}


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


def _default_limit(model: PreTrainedModel | PeftModel) -> int:
    positions = None if without_adapter(model).config.is_encoder_decoder else positions_for_text(model)
    return DEFAULT_MAX_NEW_TOKENS if positions is None else min(DEFAULT_MAX_NEW_TOKENS, max(1, positions // 2))
