"""Which teacher a run has, and what can be refused of it before any weight is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from left_trainer.compression.hidden_states import layer_pairs
from left_trainer.compression_options import BASE_TEACHER, NO_TEACHER, SELF_TEACHER
from left_trainer.models import ModelSource, load_tokenizer
from left_trainer.models.folder_files import check_has_weights
from left_trainer.models.stacks import stack_layers
from left_trainer.training_args import LeftTrainingArguments

if TYPE_CHECKING:
    from left_trainer.trainer.checks import Request

MAX_TOKENS_SHOWN = 3


def teacher_source(given: Any, args: LeftTrainingArguments) -> ModelSource | str | None:
    """The teacher that a user asks for: a model, `base` or `self`; `None` for none.

    Args:
        given: The constructor's `teacher_model`.
        args: Of the run.

    Raises:
        ValueError: Two teachers, options of one without one, or no such model.
    """
    if isinstance(given, ModelSource):
        return given
    if given is not None and args.teacher_model is not None and given != args.teacher_model:
        raise ValueError(
            f"teacher_model is given twice, {args.teacher_model!r} in args and to the trainer. Remove one of them."
        )
    teacher = args.teacher_model if given is None else given
    if teacher in (None, NO_TEACHER):
        if args.distillation_kwargs:
            raise ValueError(
                f"distillation_kwargs={args.distillation_kwargs!r} has no effect without a teacher. Pass "
                "teacher_model=..., a hub name, a path, 'base' or 'self'."
            )
        return None
    if isinstance(teacher, str) and teacher in (BASE_TEACHER, SELF_TEACHER):
        return teacher
    options = {name: value for name, value in _access(args).items() if value}
    try:
        return ModelSource.of(teacher, options)
    except ValueError as error:
        raise ValueError(
            f"teacher_{error}" if str(error).startswith("model=") else f"teacher_model: {error}"
        ) from error


def _access(args: LeftTrainingArguments) -> dict[str, Any]:
    """What of the options of the student's loading is about access to models."""
    given = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    allowed = {"trust_remote_code": getattr(args, "trust_remote_code", False)}
    return {**allowed, **{name: given[name] for name in ("token", "cache_dir", "local_files_only") if name in given}}


def check_teacher(request: Request, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """Refuse a teacher that this student cannot learn from. Returns the teacher's tokenizer.

    Raises:
        ValueError: No weights, no adapter to switch off, another family or another vocabulary where distributions are
            compared, layers that are not there.
    """
    teacher, source, options = request.teacher, request.source, request.args.distillation
    if teacher is None:
        return None
    if isinstance(teacher, str):
        method = request.method
        if teacher == BASE_TEACHER and source.adapter is None and method is not None and method.config_class is None:
            raise ValueError(
                f"teacher_model='base' is the model with its adapter off, and peft_method={method.name!r} makes none. "
                "Use teacher_model='self', a frozen copy of the model as it starts, or a method with an adapter."
            )
        return tokenizer
    if not teacher.is_loaded:
        check_has_weights(teacher.base_name)
    own = _tokenizer_of(teacher, tokenizer)
    if not options.runs_teacher:
        return own
    if teacher.family != source.family:
        raise ValueError(
            f"teacher_model={teacher.title!r} is {teacher.family} and model={source.title!r} is {source.family}, so "
            "that their tokens do not stand at the same positions. Use a teacher of the same family, or its texts: "
            "distillation_kwargs={'sequence_level': True}."
        )
    _check_same_vocabulary(request, own, tokenizer)
    if options.hidden_weight:
        students, teachers = stack_layers(source.config), stack_layers(teacher.config)
        for stack, number in students.items():
            layer_pairs(options.layer_map, number, teachers[stack], stack)
    return own


def _tokenizer_of(teacher: ModelSource, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """The teacher's tokenizer; that of the student for a loaded model that names none."""
    if teacher.is_loaded and not teacher.config._name_or_path:  # nothing says where it is
        return tokenizer
    try:
        return load_tokenizer(teacher)
    except ValueError:
        if not teacher.is_loaded:
            raise
        return tokenizer


def _check_same_vocabulary(
    request: Request, teachers: PreTrainedTokenizerBase | None, students: PreTrainedTokenizerBase | None
) -> None:
    """Refuse distributions over different tokens. What counts is the id of each token, not the tokenizer's name."""
    if teachers is None or students is None or teachers is students:
        return
    own, other = students.get_vocab(), teachers.get_vocab()
    differing = sorted(token for token in own.keys() | other.keys() if own.get(token) != other.get(token))
    if differing:
        teacher = request.teacher
        shown = ", ".join(f"{token!r} ({own.get(token)}, {other.get(token)})" for token in differing[:MAX_TOKENS_SHOWN])
        raise ValueError(
            f"teacher_model={teacher.title if isinstance(teacher, ModelSource) else teacher!r} has another vocabulary "
            f"than model={request.source.title!r}: {len(differing)} tokens have other ids, such as {shown}. Their "
            "distributions cannot be compared. Let the teacher write the targets, which works with any tokenizer: "
            "distillation_kwargs={'sequence_level': True}."
        )
