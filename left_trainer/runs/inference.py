"""Using what a training saved: answers to prompts, as the run's own evaluations give them."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from left_trainer.adapters.run_settings import RunSettings
from left_trainer.adapters.task_ids import task_inputs
from left_trainer.data.features import tokenize_sources, without_appended_end
from left_trainer.data.prompts import PromptFormat, length_limit, model_positions, room_for_answers
from left_trainer.evaluation.generation import (
    DEFAULT_MAX_NEW_TOKENS,
    end_of_prompt,
    generate_completions,
    read_generation_config,
    scored_generation_config,
)
from left_trainer.evaluation.text_metrics import decode
from left_trainer.kernels.fused_layers import use_fused_layers
from left_trainer.methods.apply import find_method
from left_trainer.methods.option_ranges import check_config
from left_trainer.methods.saving import adapter_method, adapter_positions, load_trained
from left_trainer.models import ModelSource, load_tokenizer, without_adapter
from left_trainer.models.folder_files import check_has_weights
from left_trainer.models.languages import generate_in_target_language
from left_trainer.runs.report import REPORT_FILE, TrainingReport
from left_trainer.trainer.run_checks import check_generation

logger = logging.getLogger(__name__)


class Generator:
    """Answers prompts with a fine-tuned model, as the evaluations of its run do.

    The length limit, the number of beams and all else stand in `generation_config.json` of the folder, else in that of
    the base model. A prompt that is too long is cut as in the run: in its source where it was made with the run's
    template, else by `truncation_mode`. A decoder-only model's prompt leaves room for the answer.

    Args:
        path: Folder of an adapter or of a whole model, or its name on the hub.
        num_beams: 1 is greedy; by default that of the run.
        max_new_tokens: Length limit of an answer in tokens; by default that of the run, and 128 where nothing sets one.
        device: By default the accelerator if there is one.
        prompt: Template with `{source}` that the prompts are made with; by default that of `training_report.json`.
        trust_remote_code: Whether code that comes with the base model may run.
        dtype: Of the base model's weights; by default that of the run, else that of the checkpoint.
        hub: `revision` and `token` of a name on the hub.

    Raises:
        ValueError: There is no such model, or an adapter does not fit its base.
    """

    def __init__(
        self,
        path: str,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        device: torch.device | str | None = None,
        *,
        prompt: str | None = None,
        trust_remote_code: bool = False,
        dtype: str | None = None,
        hub: Mapping[str, Any] | None = None,
    ) -> None:
        source = source_for_use(path, trust_remote_code, dtype, hub)
        path = folder_of(source)
        check_generation(num_beams, max_new_tokens, source.config)
        self.family = source.family
        self.settings = source.settings or RunSettings()
        self.model, self.tokenizer = load_for_use(source, device)
        self.generation_config = stored_generation_config(path, self.model, num_beams, max_new_tokens)
        without_adapter(self.model).generation_config = self.generation_config
        self.limits = _Limits.of(source, self.settings, self.tokenizer, self.generation_config)
        template = prompt or trained_prompt(path)
        self.format = PromptFormat(template, self.tokenizer, self.limits.rendered) if template else None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """The answer to each prompt. Says how many prompts were cut."""
        return self._answer(self.features(prompts))

    def features(self, prompts: Sequence[str]) -> Mapping[str, Any]:
        """`input_ids` of each prompt, cut where it is too long, and what else the tokenizer makes."""
        fitted = [self._fit(prompt) for prompt in prompts]
        features = tokenize_sources(fitted, self.tokenizer, None)
        limit = self.limits.tokens or sys.maxsize
        too_long = [len(ids) > limit for ids in features["input_ids"]]
        if any(too_long):
            features = self._cut(fitted, features, limit)
        n_cut = sum(a != b or c for a, b, c in zip(prompts, fitted, too_long, strict=True))
        if n_cut:
            longest = max(map(len, features["input_ids"]))
            logger.warning("%d of %d prompts are too long and were cut to %d tokens.", n_cut, len(fitted), longest)
        return features

    def _fit(self, prompt: str) -> str:
        """`prompt`, its source cut as in the run where it was made with the template."""
        source = self.format.source_of(prompt) if self.format else None
        if self.format is None or source is None:
            return prompt
        return self.format.template.format(source=self.format.fit(source, self.limits.answer))

    def _cut(self, prompts: list[str], features: Mapping[str, Any], limit: int) -> dict[str, Any]:
        if self.family == "encoder_decoder":
            return tokenize_sources(prompts, self.tokenizer, limit, self.settings.truncation_mode)
        # A decoder-only model goes on from the end of its prompt.
        begin = self.tokenizer.bos_token_id
        return {"input_ids": [end_of_prompt(torch.tensor(row), limit, begin).tolist() for row in features["input_ids"]]}

    def _answer(self, features: Mapping[str, Any]) -> list[str]:
        if self.family == "encoder_decoder":
            batch = self.tokenizer.pad(features, return_tensors="pt").to(self.model.device)
            tokens = self.model.generate(**batch, **task_inputs(self.model, len(features["input_ids"])))
        else:
            rows = [torch.tensor(ids, device=self.model.device) for ids in features["input_ids"]]
            pad = self.tokenizer.pad_token_id
            tokens = generate_completions(self.model, rows, self.tokenizer.eos_token_id if pad is None else pad)
        return decode(self.tokenizer, tokens.cpu().numpy())


@dataclasses.dataclass(frozen=True)
class _Limits:
    """Lengths in tokens.

    Args:
        rendered: As `PromptFormat.limit`.
        answer: Of these, kept free for the answer.
        tokens: Most tokens of any prompt; `None` where nothing bounds it.
    """

    rendered: int
    answer: int
    tokens: int | None

    @classmethod
    def of(
        cls,
        source: ModelSource,
        settings: RunSettings,
        tokenizer: PreTrainedTokenizerBase,
        generation: GenerationConfig,
    ) -> _Limits:
        reserved = adapter_positions(source).source
        rendered = length_limit(source.config, tokenizer, settings.max_length, reserved)
        positions = model_positions(source.config, reserved)
        new = generation.max_new_tokens or 0
        if source.family == "encoder_decoder":
            return cls(rendered, 0, min((n for n in (settings.max_length, positions) if n), default=None))
        free = positions - room_for_answers(positions, new) if positions else None
        bounds = (settings.max_length, free)
        return cls(rendered, room_for_answers(rendered, new), min((n for n in bounds if n), default=None))


def source_for_use(
    path: str, trust_remote_code: bool = False, dtype: str | None = None, hub: Mapping[str, Any] | None = None
) -> ModelSource:
    """The model in `path`, to be loaded with the dtype of its run, else that of the checkpoint.

    Args:
        path: Folder, or name on the hub.
        trust_remote_code: Whether code that comes with the base model may run.
        dtype: Of the base model's weights.
        hub: `revision` and `token` of a name on the hub.
    """
    given = {"dtype": dtype, **(hub or {})}
    options = {name: value for name, value in given.items() if value is not None}
    source = ModelSource.of(path, {"trust_remote_code": trust_remote_code, **options})
    if source.adapter is not None:
        check_config(source.adapter, path)
    check_has_weights(source.base_name)
    return dataclasses.replace(source, options={"dtype": "auto", **source.options})


def load_for_use(
    source: ModelSource, device: torch.device | str | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model of `source` with its adapter, in evaluation mode, and the tokenizer that prompts are written with.

    Args:
        source: As `source_for_use` returns it.
        device: By default the accelerator if there is one.
    """
    tokenizer = load_tokenizer(source)
    if source.family == "decoder_only":
        tokenizer = without_appended_end(tokenizer)
    model = load_trained(source, is_trainable=False)
    prepare_for_use(model, source)
    if source.family == "encoder_decoder":
        generate_in_target_language(without_adapter(model), tokenizer)
    model.to(device or torch.accelerator.current_accelerator() or "cpu").eval()
    return model, tokenizer


def folder_of(source: ModelSource) -> str:
    """Where the files of a run are: the folder that the user named, or the local copy of an adapter on the hub."""
    return str(source.model)


def stored_generation_config(
    path: str, model: PreTrainedModel | PeftModel, num_beams: int | None = None, max_new_tokens: int | None = None
) -> GenerationConfig:
    """How the run in `path` generated: its `generation_config.json`, else the model's own config.

    Args:
        path: Folder of an adapter or of a whole model.
        model: Loaded from there.
        num_beams: Replaces the stored number.
        max_new_tokens: Replaces the stored limit.
    """
    config = read_generation_config(path) or without_adapter(model).generation_config
    given = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    if config.max_new_tokens is None and config.max_length is None:
        given["max_new_tokens"] = max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    return scored_generation_config(config, {name: value for name, value in given.items() if value is not None})


def trained_prompt(path: str) -> str | None:
    """The template of the run's prompts; `None` where the folder has no report."""
    return TrainingReport.read(path).prompt if (Path(path) / REPORT_FILE).is_file() else None


def prepare_for_use(model: PreTrainedModel | PeftModel, source: ModelSource | None = None) -> None:
    """Let a loaded model compute as in training: what the method of its adapter needs, and the same order of sums.

    Args:
        model: With its adapter.
        source: What it was loaded from, which may name the method; by default the config of the adapter tells it.
    """
    use_fused_layers(model)
    method = adapter_method(source) if source else find_method(model)
    if isinstance(model, PeftModel) and method and method.prepare:
        method.prepare(model)
