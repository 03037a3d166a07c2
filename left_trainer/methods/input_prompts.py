"""Prompts in the input: made of what the model computes from ids, and put where they are to stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import CPTConfig, PeftConfig, PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from left_trainer.methods.method import Batches
from left_trainer.methods.training_text import first_rows
from left_trainer.models import InputEmbeddings, has_absolute_positions, input_embeddings

INPUT_PROMPTS = (PromptTuningConfig, PromptEncoderConfig, CPTConfig)
KEPT_INPUTS = ("input_ids", "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")
ENCODER_OPTIONS = ("global_attention_mask", "output_attentions", "output_hidden_states")


def wrap(model: PreTrainedModel, config: PeftConfig, adapter_name: str = "default") -> PeftModel:
    """`get_peft_model`, with prompts in the input made of what `model` computes from ids.

    PEFT takes the module called `embeddings.word_embeddings`, or else the first matrix with one row for each token. In
    an encoder-decoder model that may be the decoder's, and a scale outside of it is lost (peft 0.21).
    """
    if not isinstance(config, INPUT_PROMPTS):
        return get_peft_model(model, config, adapter_name)
    model.embeddings = nn.Module()
    model.embeddings.word_embeddings = input_embeddings(model)
    try:
        wrapped = get_peft_model(model, config, adapter_name)
    finally:
        del model.embeddings
    prepare_input_prompt(wrapped)
    return wrapped


def prepare_input_prompt(model: PeftModel) -> None:
    """Embed ids as the model does, and put prompts where the adapter's `prompt_position` says, in training and use."""
    base, config = model.get_base_model(), model.active_peft_config
    if not isinstance(model.word_embeddings, InputEmbeddings):
        model.word_embeddings = input_embeddings(base)
    if getattr(config, "prompt_position", "before") is None:
        is_moved = base.config.is_encoder_decoder and has_absolute_positions(base)
        config.prompt_position = "after" if is_moved else "before"
    if base.config.is_encoder_decoder and not hasattr(model, "prompt_placement"):
        model.prompt_placement = PromptPlacement(model, base)


def derive_input_prompt(model: PreTrainedModel, config: PeftConfig) -> dict[str, Any]:
    """The width of prompts, which PEFT takes for the model's even where embeddings are narrower (OPT-350m).

    Raises:
        ValueError: An option that `model` has no place for, or that only training would hear of.
    """
    if getattr(config, "prompt_position", None) == "after" and not model.config.is_encoder_decoder:
        raise ValueError(
            f"prompt_position='after', and {type(model).__name__} has no encoder: in a decoder-only model a token does "
            "not see what follows it. Leave prompt_position out."
        )
    # PEFT's generate leaves the prompts of the decoder out (peft 0.21).
    if model.config.is_encoder_decoder and getattr(config, "num_transformer_submodules", None) == 2:
        raise ValueError(
            "num_transformer_submodules=2 trains prompts before the decoder's input that `generate` leaves out, "
            "so texts would come from another model than the loss. Leave it out, or use prefix_tuning for the decoder."
        )
    heads = getattr(model.config, "num_attention_heads", 1)  # PEFT asks for it, and needs it for prefixes only
    return {"token_dim": model.get_input_embeddings().weight.shape[1], "num_attention_heads": heads}


class PromptPlacement:
    """Hooks of an encoder-decoder model that put prompts in the right place.

    PEFT hands over prompts and source as one sequence of embeddings, and the mask of both. With
    `prompt_position="after"` the encoder gets each row as source, prompts, padding, and hands on the states of the
    source alone. The base model, called with ids, computes as ever.

    Args:
        model: With prompts in the input.
        base: The model inside of it.
    """

    def __init__(self, model: PeftModel, base: PreTrainedModel) -> None:
        self.config, self.encoder = model.peft_config, base.get_encoder()
        self.adapter = model.active_adapter
        self.order: torch.Tensor | None = None
        self.kept: dict[str, Any] = {}
        self.encoder.register_forward_pre_hook(self.before_encoder, with_kwargs=True)
        self.encoder.register_forward_hook(self.after_encoder)
        base.register_forward_pre_hook(self.before_base, with_kwargs=True)
        model.register_forward_pre_hook(self.before_model, with_kwargs=True)
        model.register_forward_hook(self.after_model, always_call=True)

    @property
    def behind(self) -> int:
        """How many prompts stand behind the source; 0 where they stand before it."""
        config = self.config[self.adapter]
        return config.num_virtual_tokens if getattr(config, "prompt_position", "before") == "after" else 0

    def before_model(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep the ids, without which FSMT's decoder has no causal mask (transformers 5.23), and the decoder's inputs,
        which PEFT drops or lengthens with multitask prompts (peft 0.21).
        """
        self.kept = {name: kwargs[name] for name in KEPT_INPUTS if kwargs.get(name) is not None}

    def after_model(self, model: nn.Module, args: Any, outputs: Any) -> None:
        self.kept = {}

    def before_base(self, base: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Encode the source with its prompts, unless `generate` has, and hide prompts behind it from the decoder."""
        if kwargs.get("inputs_embeds") is not None:
            options = {name: kwargs[name] for name in ENCODER_OPTIONS if kwargs.get(name) is not None}
            sequence = {"inputs_embeds": kwargs.pop("inputs_embeds"), "attention_mask": kwargs.get("attention_mask")}
            kwargs = {**kwargs, "encoder_outputs": self.encoder(**sequence, **options, return_dict=True), **self.kept}
        count, encoded, mask = self.behind, kwargs.get("encoder_outputs"), kwargs.get("attention_mask")
        if count and encoded is not None and mask is not None and mask.shape[1] == encoded[0].shape[1] + count:
            kwargs["attention_mask"] = mask[:, count:]
        return args, kwargs

    def before_encoder(self, encoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Order each row as source, prompts, padding."""
        self.order, count, embeddings = None, self.behind, kwargs.get("inputs_embeds")
        if embeddings is None:
            return args, kwargs
        if not args:
            kwargs = {"input_ids": None, **kwargs}  # FSMT's encoder has no default for it
        if not count:
            return args, kwargs
        mask = kwargs.get("attention_mask")
        mask = torch.ones(embeddings.shape[:2], device=embeddings.device) if mask is None else mask
        place = torch.where(mask.bool(), 0, 2)
        place[:, :count] = 1
        self.order = place.argsort(dim=1, stable=True)
        kwargs["inputs_embeds"] = embeddings.gather(1, self.order[..., None].expand_as(embeddings))
        kwargs["attention_mask"] = mask.gather(1, self.order)
        return args, kwargs

    def after_encoder(self, encoder: nn.Module, args: Any, outputs: Any) -> Any:
        """Put the states back into the order of the input, without the prompts."""
        if self.order is None:
            return outputs
        states = outputs.last_hidden_state
        back = self.order.argsort(dim=1)[:, self.behind :]
        outputs.last_hidden_state = states.gather(1, back[..., None].expand(-1, -1, states.shape[-1]))
        return outputs


@torch.no_grad()
def initialize_from_vocabulary(model: PeftModel, batches: Batches, options: Mapping[str, Any]) -> None:
    """Start prompts from the embeddings of different tokens of the first training rows, special tokens left out."""
    config, encoder = model.active_peft_config, model.prompt_encoder[model.active_adapter]
    if config.prompt_tuning_init != "SAMPLE_VOCAB":
        return
    seen = torch.cat([row["input_ids"] for row in first_rows(batches)]).unique()
    tokens = seen[~torch.isin(seen, special_tokens(model.get_base_model()).to(seen.device))]
    tokens = tokens if len(tokens) else seen
    count = encoder.embedding.num_embeddings
    order = torch.cat([torch.randperm(len(tokens)) for _ in range(count // len(tokens) + 1)])[:count]
    prompts = model.word_embeddings(tokens[order.to(tokens.device)])
    encoder.embedding.weight.copy_(prompts)
    if hasattr(encoder, "prefix_task_cols"):  # of each task: the factor that multitask prompts start from is 1
        encoder.prefix_task_cols.fill_(1 / encoder.num_ranks)
        encoder.prefix_task_rows.fill_(1)


def special_tokens(model: PreTrainedModel) -> torch.Tensor:
    """The ids that the model's configs call by a name: padding, start, end and so on."""
    ids: set[int] = set()
    for config in (model.config, model.generation_config):
        named = [value for name, value in (config.to_dict() if config else {}).items() if name.endswith("_token_id")]
        for value in named:
            ids.update(value if isinstance(value, list) else [value])
    return torch.tensor(sorted(identifier for identifier in ids if isinstance(identifier, int)), dtype=torch.long)
