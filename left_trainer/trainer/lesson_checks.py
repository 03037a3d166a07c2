"""What can be refused of the ways to use a teacher, before any weight is loaded."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from left_trainer.data.dataset_types import is_lazy
from left_trainer.models import ModelSource
from left_trainer.trainer.checks import Request, why_no_prompt

FLATTENING = ("bfd", "bfd_split")  # strategies of packing with which TRL makes one row of a batch


def check_lessons(
    request: Request, students: PreTrainedTokenizerBase | None, teachers: PreTrainedTokenizerBase | None
) -> None:
    """Refuse rows, batches and tokenizers with which the teacher cannot be used as asked.

    Args:
        request: With the teacher.
        students: Tokenizer of the student.
        teachers: Tokenizer of the teacher.

    Raises:
        ValueError: Rows without text for `sequence_level`, without prompts for `on_policy_fraction`, or that are not
            the same each time for `cache_teacher`.
    """
    if request.teacher is None or request.train_dataset is None:
        return
    options = request.args.distillation
    if options.sequence_level:
        _check_texts(request, teachers)
    if options.on_policy_fraction:
        _check_prompts(request, students)
    if options.cache_teacher:
        _check_cache(request)


def _check_texts(request: Request, teachers: PreTrainedTokenizerBase | None) -> None:
    rows, asked = request.train_dataset, "distillation_kwargs={'sequence_level': True}"
    lets_write = f"{asked} lets the teacher write the targets"
    if not _is_stored(rows):
        raise ValueError(
            f"{lets_write} before the training, and train_dataset is {_kind(rows)}. Pass rows that are stored: "
            "datasets.Dataset.from_list(list(rows))."
        )
    if request.formatting_func is not None:
        raise ValueError(
            f"{lets_write}, and formatting_func makes one text of each row, in which nothing tells where the target "
            "begins. Remove it, and pass rows with 'prompt' and 'completion'."
        )
    first = next(iter(rows))
    if "input_ids" in first or not {"prompt", "completion"} <= set(first):
        what = "token ids" if "input_ids" in first else f"the columns {', '.join(map(repr, first))}"
        raise ValueError(
            f"{lets_write} from the text of the prompts, and train_dataset has {what}. Pass rows with the columns "
            "'prompt' and 'completion'."
        )
    if teachers is None:
        raise ValueError(
            f"{asked} needs the teacher's tokenizer, and there is none. Pass a teacher_model whose folder has one, or "
            "processing_class."
        )
    if not isinstance(first["prompt"], str):
        _check_chat(request, teachers, asked)
    source = request.source if isinstance(request.teacher, str) else request.teacher
    assert isinstance(source, ModelSource)
    n_words = source.config.get_text_config().vocab_size
    if source is not request.source and len(teachers) > n_words:
        raise ValueError(
            f"{asked}: the tokenizer of teacher_model={source.title!r} has {len(teachers)} tokens and the teacher's "
            f"vocabulary {n_words}. Pass the teacher's name or path, so that its own tokenizer is loaded with it."
        )


def _check_chat(request: Request, teachers: PreTrainedTokenizerBase, asked: str) -> None:
    source = request.source if isinstance(request.teacher, str) else request.teacher
    assert isinstance(source, ModelSource)
    if source.family == "encoder_decoder" or not teachers.chat_template:
        raise ValueError(
            f"{asked}: the prompts of train_dataset are chat messages, and teacher_model={source.title!r} has no chat "
            "template. Use a teacher that has one, or make text of the prompts."
        )


def _check_prompts(request: Request, students: PreTrainedTokenizerBase | None) -> None:
    fraction = request.args.distillation.on_policy_fraction
    asked = f"distillation_kwargs={{'on_policy_fraction': {fraction:g}}} lets the student answer the training prompts"
    if students is None or students.pad_token_id is None:
        raise ValueError(f"{asked}, which takes a tokenizer with a pad token. Pass processing_class.")
    if _flattens(request):
        raise ValueError(f"{asked}, and {_flattens(request)} joins rows to one. Set it to False.")
    reason = why_no_prompt(request, request.train_dataset) if request.source.family == "decoder_only" else None
    if reason:
        raise ValueError(
            f"{asked}, and train_dataset does not say where they end: {reason}. Pass rows with 'prompt' and "
            "'completion'."
        )


def _check_cache(request: Request) -> None:
    rows, source = request.train_dataset, request.source
    asked = f"distillation_kwargs={{'cache_teacher': {request.args.distillation.cache_teacher}}}"
    if not _is_stored(rows):
        raise ValueError(
            f"{asked} keeps what the teacher says of the training rows before the training, and train_dataset is "
            f"{_kind(rows)}. Pass rows that are stored: datasets.Dataset.from_list(list(rows)); or set cache_teacher=0."
        )
    if _flattens(request):
        raise ValueError(
            f"{asked} finds rows by their tokens, and {_flattens(request)} makes one row of each batch. Set it to "
            "False, or cache_teacher=0."
        )
    teacher = request.teacher if isinstance(request.teacher, ModelSource) else source
    n_words = min(model.config.get_text_config().vocab_size for model in (source, teacher))
    if request.args.distillation.cache_teacher > n_words:
        raise ValueError(f"{asked} is more than the {n_words} tokens of the vocabulary. Lower it, for example to 16.")


def _is_stored(rows: Any) -> bool:
    return isinstance(rows, Dataset) and not is_lazy(rows)


def _kind(rows: Any) -> str:
    return "computed when it is read" if isinstance(rows, Dataset) else "a stream"


def _flattens(request: Request) -> str | None:
    """The argument with which a batch becomes one row."""
    args = request.args
    if request.source.family == "encoder_decoder":
        return None
    if args.packing and (args.packing_strategy in FLATTENING or args.distillation.on_policy_fraction):
        return "packing=True"
    return "padding_free=True" if args.padding_free else None
