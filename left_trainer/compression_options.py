"""Options of the two ways to a smaller model: `distillation_kwargs`, `shrink_to` and `shrink_kwargs`.

Each is a typed record that is checked when the arguments are constructed, before any weight is loaded.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from left_trainer.methods.options import matches, parse_options
from left_trainer.ranges import ANY, COUNT, NOT_NEGATIVE, POSITIVE, PROBABILITY, Range, check_range, shown_value
from left_trainer.registry import did_you_mean

DivergenceKind = Literal["forward_kl", "reverse_kl", "jsd"]
Importance = Literal["block_influence", "first_order", "magnitude", "random"]
Schedule = Literal["at_start", "linear", "cubic"]
Target: typing.TypeAlias = Mapping[str, float | int | str]
# Names of teachers that are no model's.
BASE_TEACHER, SELF_TEACHER, NO_TEACHER = "base", "self", "none"

INSIDE = Range(above=0, below=1)
PART = Range(above=0, at_most=1)
DIMENSIONS: dict[str, Range | tuple[str, ...]] = {
    "params": PART,
    "layers": COUNT,
    "encoder_layers": COUNT,
    "decoder_layers": COUNT,
    "ffn": PART,
    "heads": PART,
    "vocabulary": ("data",),
}
VOCABULARY = "vocabulary"
KEEP = re.compile(r"\s*(?P<metric>[A-Za-z_]\w*)\s*>=\s*(?P<share>[0-9]*\.?[0-9]+)\s*")
OptionsT = TypeVar("OptionsT")

RANGES: dict[str, Range] = {
    "beta": INSIDE,
    "alpha": PROBABILITY,
    "temperature": POSITIVE,
    "hidden_weight": NOT_NEGATIVE,
    "layer_map": COUNT,
    "num_beams": COUNT,
    "on_policy_fraction": PROBABILITY,
    "cache_teacher": Range(at_least=0),
    "schedule": COUNT,
    "end": PART,
    "n_shrinks": COUNT,
    "importance_batches": COUNT,
}
CHOICES: dict[str, tuple[str, ...]] = {
    "loss": get_args(DivergenceKind),
    "layer_map": ("uniform", "last"),
    "teacher_dtype": ("auto", "float32", "bfloat16", "float16"),
    "schedule": get_args(Schedule),
    "importance": get_args(Importance),
}


@dataclass(frozen=True)
class DistillationOptions:
    r"""How a student learns from its teacher: `distillation_kwargs`.

    In a step the loss of a target token is $(1 - \alpha) \ell + \alpha T^2 D(p, q)$, with the task's cross-entropy
    $\ell$ and a divergence $D$ between the distributions $p$ of the teacher and $q$ of the student at the temperature
    $T$ (Hinton et al., 2015, https://arxiv.org/abs/1503.02531).

    Args:
        loss: $D$: `forward_kl`, $KL(p \| q)$; `reverse_kl`, $KL(q \| p)$; `jsd`, the generalized Jensen-Shannon
            divergence with the weight `beta` (Agarwal et al., 2023, https://arxiv.org/abs/2306.13649).
        beta: Of `jsd`.
        alpha: Weight of the teacher; 0 is plain training and 1 is the teacher alone. By default 0.5, and 0 with
            `sequence_level`, whose targets are the teacher's already.
        temperature: $T$.
        hidden_weight: Weight of the mean squared difference of hidden states, which is added.
        layer_map: Which layers of the teacher the student's are compared with: `uniform`, spread evenly; `last`, the
            last ones; or pairs of a student's layer and a teacher's, counted from 1.
        sequence_level: The teacher writes the targets once, and the student trains on them (Kim and Rush, 2016,
            https://arxiv.org/abs/1606.07947).
        num_beams: Beams of `sequence_level`; 1 is greedy.
        on_policy_fraction: Share of the steps on texts that the student has generated.
        cache_teacher: Keep this many of the teacher's best tokens at each position on disk; 0 runs the teacher in each
            step.
        teacher_dtype: Of the teacher's weights, such as `bfloat16`; by default that of the student.
        teacher_quantization_config: With which the teacher is loaded.
    """

    loss: DivergenceKind = "forward_kl"
    beta: float = 0.5
    alpha: float | None = None
    temperature: float = 2.0
    hidden_weight: float = 0.0
    layer_map: str | list[list[int]] = "uniform"
    sequence_level: bool = False
    num_beams: int = 1
    on_policy_fraction: float = 0.0
    cache_teacher: int = 0
    teacher_dtype: str | None = None
    teacher_quantization_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        pairs = () if isinstance(self.layer_map, str) else self.layer_map
        if not isinstance(self.layer_map, str) and not (pairs and all(len(pair) == 2 for pair in pairs)):
            raise ValueError(
                f"distillation_kwargs has layer_map={shown_value(self.layer_map)}, which must be 'uniform', 'last' or "
                "pairs of a student's layer and a teacher's, such as [[1, 2], [2, 4]]."
            )
        if not self.cache_teacher:
            return
        for name, excluded, why in (
            ("loss", self.loss != "forward_kl", "needs the teacher's whole distribution"),
            ("hidden_weight", self.hidden_weight > 0, "needs the teacher's hidden states"),
            ("on_policy_fraction", self.on_policy_fraction > 0, "makes new texts in each step"),
        ):
            if excluded:
                raise ValueError(
                    f"distillation_kwargs has cache_teacher={self.cache_teacher}, which keeps the teacher's best "
                    f"tokens on the training data, and {name}={getattr(self, name)!r}, which {why}. Remove one of them."
                )

    @property
    def weight(self) -> float:
        """Alpha, with its default."""
        return (0.0 if self.sequence_level else 0.5) if self.alpha is None else self.alpha

    @property
    def runs_teacher(self) -> bool:
        """Whether a step needs the teacher's distributions or hidden states."""
        return self.weight > 0 or self.hidden_weight > 0 or self.on_policy_fraction > 0


@dataclass(frozen=True)
class ShrinkOptions:
    """How a model shrinks while it is trained: `shrink_kwargs`.

    Args:
        schedule: When parts are removed: `at_start`, all at once; `linear` or `cubic` up to `end` (Zhu and Gupta, 2017,
            https://arxiv.org/abs/1710.01878); or the steps themselves.
        end: Share of the training after which the model has its last size.
        n_shrinks: Number of removals of `linear` and `cubic`.
        importance: What decides which parts stay: `block_influence` of layers (Men et al., 2024,
            https://arxiv.org/abs/2403.03853); `first_order`, for all parts (Michel et al., 2019,
            https://arxiv.org/abs/1905.10650; Molchanov et al., 2019, https://arxiv.org/abs/1906.10771); `magnitude` of
            weights; `random`, as the control. By default `block_influence` for layers and `first_order` for the rest.
        importance_batches: Number of training batches that it is collected from.
        keep: Such as `rougeL>=0.95`: shrink until the metric on the validation split falls below that share of its
            start, then return to the last size that held.
        keep_sizes: Leave a whole model of each size, with its scores.
    """

    schedule: str | list[int] = "cubic"
    end: float = 0.3
    n_shrinks: int = 8
    importance: str | None = None
    importance_batches: int = 8
    keep: str | None = None
    keep_sizes: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, str):
            increasing = all(a < b for a, b in zip(self.schedule, self.schedule[1:], strict=False))
            if not self.schedule or not increasing:
                raise ValueError(
                    f"shrink_kwargs has schedule={shown_value(self.schedule)}, which must be increasing numbers of "
                    f"steps, or one of {', '.join(get_args(Schedule))}."
                )
        if self.keep is not None:
            share = self.kept_share
            if share is None or share not in PART:
                raise ValueError(
                    f"shrink_kwargs has keep={self.keep!r}, which must be a metric and a share of its start above 0 "
                    "and at most 1, such as 'rougeL>=0.95'."
                )
            if self.schedule == "at_start":
                raise ValueError(
                    f"shrink_kwargs has keep={self.keep!r}, which shrinks step by step, and schedule='at_start', which "
                    "shrinks once. Use schedule='cubic' or 'linear', or remove keep."
                )

    @property
    def kept_metric(self) -> str | None:
        """The metric of `keep`."""
        found = KEEP.fullmatch(self.keep or "")
        return found["metric"] if found else None

    @property
    def kept_share(self) -> float | None:
        """The share of `keep`."""
        found = KEEP.fullmatch(self.keep or "")
        return float(found["share"]) if found else None


def read_options(record: type[OptionsT], argument: str, value: str | Mapping[str, Any] | None) -> OptionsT:
    """The options that a user wrote, as a record.

    Args:
        record: `DistillationOptions` or `ShrinkOptions`.
        argument: What the user calls them.
        value: A mapping, a JSON object, or `alpha=0.5,temperature=2`.

    Raises:
        ValueError: An option that does not exist, a value of another type or outside of its range.
    """
    given = parse_options(argument, value)
    hints = typing.get_type_hints(record)
    fields = {item.name: item for item in dataclasses.fields(record)}  # type: ignore[arg-type]
    for name, option in given.items():
        if name not in fields:
            raise ValueError(
                f"{argument} has {name!r}, which is not one of its options.{did_you_mean(name, fields)} Expected some "
                f"of {', '.join(fields)}."
            )
        choices = CHOICES.get(name, ())
        if choices and isinstance(option, str) and option not in choices:
            raise ValueError(
                f"{argument} has {name}={option!r}, which is not known.{did_you_mean(option, choices)} Expected one of "
                f"{', '.join(choices)}."
            )
        if not matches(option, hints[name]):
            expected = str(hints[name]).replace("typing.", "").replace("<class '", "").replace("'>", "")
            raise ValueError(
                f"{argument} has {name}={shown_value(option)} ({type(option).__name__}), which must have the type "
                f"{expected}."
            )
        check_range(
            f"{argument} {name}",
            option,
            RANGES.get(name, ANY),
            f"The default is {fields[name].default!r}.",
        )
    return record(**given)


def parse_shrink_to(text: str | None) -> dict[str, float | int | str]:
    """The sizes that `shrink_to` names, by dimension; empty for `None`.

    `params` is a share of the parameters apart from embeddings and head, `ffn` and `heads` are shares, layers are
    numbers of layers, `vocabulary` is `data`.

    Raises:
        ValueError: An unknown dimension, or a size that no model has.
    """
    target: dict[str, float | int | str] = {}
    for part in (text or "").split(",") if text is not None else ():
        name, _, value = (item.strip() for item in part.partition("="))
        if name not in DIMENSIONS:
            raise ValueError(
                f"shrink_to={text!r} has {part.strip()!r}, which names no dimension.{did_you_mean(name, DIMENSIONS)} "
                f"Expected some of {', '.join(DIMENSIONS)}, such as shrink_to='params=0.6' or "
                "'encoder_layers=4,decoder_layers=2'."
            )
        if name in target:
            raise ValueError(f"shrink_to={text!r} names {name} twice. Name it once.")
        target[name] = _size(text or "", name, value, DIMENSIONS[name])
    if "params" in target and set(target) - {"params", VOCABULARY}:
        raise ValueError(
            f"shrink_to={text!r} names params, which chooses the size of every dimension but the vocabulary, together "
            f"with {', '.join(sorted(set(target) - {'params', VOCABULARY}))}. Name either."
        )
    return target


def _size(text: str, name: str, value: str, allowed: Range | tuple[str, ...]) -> float | int | str:
    if isinstance(allowed, tuple):
        if value not in allowed:
            raise ValueError(f"shrink_to={text!r} has {name}={value}. Expected {name}={' or '.join(allowed)}.")
        return value
    try:
        size: float | int = int(value) if allowed is COUNT else float(value)
    except ValueError:
        size = float("nan")
    if size not in allowed:
        kind = "a whole number" if allowed is COUNT else "a share"
        raise ValueError(f"shrink_to={text!r} has {name}={value}, which must be {kind}, {allowed}.")
    return size


def check_compression(args: Any) -> None:
    """Raise `ValueError` for options of a teacher or of shrinking that no run can have."""
    read_options(DistillationOptions, "distillation_kwargs", args.distillation_kwargs)
    read_options(ShrinkOptions, "shrink_kwargs", args.shrink_kwargs)
    if args.shrink_kwargs and not set(args.target_size) - {VOCABULARY}:
        raise ValueError(
            f"shrink_kwargs={args.shrink_kwargs!r} says how to shrink, and nothing is removed step by step. Say to "
            "which size: shrink_to='params=0.6'."
        )
