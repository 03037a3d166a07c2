"""Training with the tokens that the data need alone: `shrink_to="vocabulary=data"`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase, Seq2SeqTrainer
from trl import maybe_convert_to_chatml

from left_trainer.compression.teacher import Teacher
from left_trainer.compression.vocabulary import TrimmedVocabulary, trim_model, trim_tokenizer
from left_trainer.compression.vocabulary_tables import configs_of, named_ids, rename_ids, renamed, with_size
from left_trainer.data.dataset_types import AnyDataset, is_lazy
from left_trainer.data.features import named_datasets
from left_trainer.methods.patterns import TOKENS
from left_trainer.models import ModelSource
from left_trainer.trainer.checks import Request
from left_trainer.trainer.sharding_checks import uses_deepspeed, uses_fsdp
from left_trainer.training_args import LeftTrainingArguments

ASKED = "shrink_to='vocabulary=data'"


def with_trimmed_vocabulary(
    request: Request, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Request, TrimmedVocabulary]:
    """A request in which ids are those of a trimmed vocabulary, and that vocabulary.

    Raises:
        ValueError: The rows are tokens, or are streamed; the model has an adapter or is quantized; the tokenizer cannot
            be trimmed.
    """
    check_request(request)
    if tokenizer is None:
        raise ValueError(f"{ASKED} needs a tokenizer, and there is none. Pass it as processing_class.")
    args = request.args
    generation = args.generation_config and Seq2SeqTrainer.load_generation_config(args.generation_config)
    needed = named_ids(*_configs(request), generation) | _ids_of_tokens(args, tokenizer)
    options = {name: value for name, value in args.peft_options.items() if name in TOKENS}
    renamed(options, lambda number: needed.add(number) or number)  # type: ignore[func-returns-value]
    vocabulary = trim_tokenizer(tokenizer, RowTexts(request, tokenizer), needed)
    new_id = vocabulary.new_ids.__getitem__
    if generation:
        generation = copy.deepcopy(generation)
        rename_ids(new_id, generation)
    args = args.replaced(
        peft_kwargs={**args.peft_options, **renamed(options, new_id)} or None, generation_config=generation or None
    )
    return dataclasses.replace(request, args=args), vocabulary


def check_request(request: Request) -> None:
    """Raise `ValueError` where a vocabulary cannot be trimmed to the data of `request`."""
    args, config = request.args, request.peft_config
    datasets = named_datasets(request.train_dataset, request.eval_dataset)
    datasets = {name: dataset for name, dataset in datasets.items() if not isinstance(dataset, str)}
    tokens = next((name for name, dataset in datasets.items() if "input_ids" in next(iter(dataset), ())), None)
    stream = next((name for name, rows in datasets.items() if not isinstance(rows, Dataset) or is_lazy(rows)), None)
    trains_adapter = config is not None or request.method is None or request.method.config_class is not None
    ids = [name for name in TOKENS if getattr(config, name, None)]
    for is_wrong, reason, advice in (
        (request.train_dataset is None, "there is no train_dataset", "Pass the rows, as text"),
        (
            tokens is not None,
            f"{tokens} holds token ids, which are of the whole vocabulary",
            "Pass the rows as text: prompt and completion, text, or messages",
        ),
        (stream is not None, f"{stream} is a stream, which is read once", "Pass rows that are stored"),
        (
            request.source.adapter is not None,
            "the model has an adapter, which was trained with the whole vocabulary",
            "Merge it first (`left-trainer merge`), or start from the model without it",
        ),
        (
            request.is_quantized or bool(request.method and request.method.quantization),
            "the weights are quantized, and the smaller model has to be saved whole",
            "Trim the model first with left_trainer.compression.trim_vocabulary, save it, and pass its folder",
        ),
        (
            (trains_adapter and uses_fsdp(args)) or uses_deepspeed(args),
            "the smaller model is saved beside the adapter, and FSDP or DeepSpeed spread it over processes",
            "Trim the model first with left_trainer.compression.trim_vocabulary, save it, and pass its folder",
        ),
        (
            args.chat_template_path is not None,
            "chat_template_path changes the texts afterwards",
            "Set tokenizer.chat_template and pass the tokenizer as processing_class",
        ),
        (bool(ids), f"peft_config names ids of tokens ({', '.join(ids)})", "Pass peft_method and peft_kwargs"),
    ):
        if is_wrong:
            raise ValueError(f"{ASKED} keeps the tokens that the data need, and {reason}. {advice}.")


def has_students_vocabulary(request: Request) -> bool:
    """Whether the teacher of a run reads and writes the student's tokens, so that it is trimmed with the student."""
    return isinstance(request.teacher, str) or (request.teacher is not None and request.args.distillation.runs_teacher)


def with_students_tokens(teacher: Teacher, request: Request, vocabulary: TrimmedVocabulary | None) -> Teacher:
    """The teacher with the student's tokens, where the two are compared over all of them.

    Raises:
        ValueError: As `trim_model`.
    """
    if vocabulary is None or not isinstance(request.teacher, ModelSource) or not has_students_vocabulary(request):
        return teacher
    if request.teacher.is_loaded:  # and may be used elsewhere
        teacher = Teacher(teacher.title, copy.deepcopy(teacher.model), teacher.tokenizer)
    trim_model(teacher.model, vocabulary)
    return teacher


def request_to_plan(request: Request, vocabulary: TrimmedVocabulary | None) -> Request:
    """`request` with a model of the size that it will have."""
    if vocabulary is None:
        return request
    source = request.source
    config = with_size(source.config, vocabulary.size_in(source.config.get_text_config().vocab_size))
    return dataclasses.replace(request, source=dataclasses.replace(source, config=config))


def tell_size(vocabulary: TrimmedVocabulary, args: LeftTrainingArguments) -> None:
    """Say once how much smaller the vocabulary is."""
    if args.process_index == 0:
        print(f"{vocabulary}.", flush=True)


class RowTexts:
    """The texts that the rows of a request will be tokenized as.

    Args:
        request: Its rows are text.
        tokenizer: Renders chat messages.
    """

    def __init__(self, request: Request, tokenizer: PreTrainedTokenizerBase) -> None:
        self.request, self.tokenizer = request, tokenizer

    def __iter__(self) -> Iterator[str]:
        for dataset in named_datasets(self.request.train_dataset, self.request.eval_dataset).values():
            if not isinstance(dataset, str):
                yield from self._texts(dataset)

    def _texts(self, dataset: AnyDataset) -> Iterator[str]:
        formatting, field = self.request.formatting_func, self.request.args.dataset_text_field
        end = self.request.args.eos_token or self.tokenizer.eos_token or ""
        read: Callable[[Mapping[str, Any]], list[str]] = self._texts_of_row
        for row in dataset:
            texts = [formatting(row)] if formatting else [row[field]] if field in row else read(row)
            for text in texts:
                yield text
                if self.request.source.family == "decoder_only" and not text.endswith(end):
                    yield text + end

    def _texts_of_row(self, row: Mapping[str, Any]) -> list[str]:
        row = maybe_convert_to_chatml(dict(row))
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(prompt, str):
            return [prompt] if completion is None else [prompt, completion.strip(), prompt + completion]
        if prompt is None:
            return [self._rendered(row, row["messages"])]
        return [
            self._rendered(row, prompt, add_generation_prompt=True),
            *([self._rendered(row, [*prompt, *completion])] if completion else []),
        ]

    def _rendered(self, row: Mapping[str, Any], messages: Any, **options: Any) -> str:
        tools, given = row.get("tools"), row.get("chat_template_kwargs") or {}
        text = self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options, **given)
        return str(text)


def _configs(request: Request) -> list[Any]:
    """The configs of a model that is loaded, or those that it will have."""
    source = request.source
    if source.is_loaded:
        return configs_of(source.model)
    try:
        generation = GenerationConfig.from_pretrained(source.base_name, **source.hub_options)
    except OSError:  # there is none
        generation = None
    return [source.config, generation]


def _ids_of_tokens(args: LeftTrainingArguments, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Of tokens that the arguments name."""
    named = [args.eos_token, args.pad_token]
    return {tokenizer.get_vocab()[token] for token in named if token in tokenizer.get_vocab()}
