"""Comparisons that are ready to run, as what a user would write in a YAML file: `left-trainer compare --set NAME`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from left_trainer.comparison.cell import Cell
from left_trainer.embedded import MODEL_NAMES
from left_trainer.models.stacks import stack_layers
from left_trainer.registry import did_you_mean

SETS = ("default", "smaller")
SIZES = (0.75, 0.5, 0.25)  # of the parameters apart from embeddings and head
ONCE = "schedule=at_start"
# In an epoch at the default rate, the embedded models do not recover from losing half of their few layers.
EMBEDDED = {"learning_rate": 1e-3}
# Where rows are many, the targets alone teach the embedded tasks, and no teacher adds to them.
EMBEDDED_STUDENTS = {"max_train_samples": 128, "max_steps": 300}
# Ways for a student to learn from its teacher, by the name of the setting.
LOSSES = {
    "forward_kl": "loss=forward_kl",
    "reverse_kl": "loss=reverse_kl",
    "jsd": "loss=jsd",
    "hidden_states": "hidden_weight=1.0",
    "sequence_level": "sequence_level=true",
}


def set_options(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a set: `methods`, `tasks` and arguments of every run.

    Args:
        name: One of `SETS`.
        arguments: Of every run, as the user gave them; they say which model is compared.

    Raises:
        ValueError: There is no set of this name, or no such model.
    """
    if name not in SETS:
        raise ValueError(f"set={name!r} is not known.{did_you_mean(name, SETS)} Expected one of {', '.join(SETS)}.")
    if name == "default":
        return {}
    model_args, _, args = Cell("base", "", arguments, {}).parse(Path())
    source = model_args.source(args)
    is_embedded = source.base_name in MODEL_NAMES.values()
    settings = smaller(source.config, EMBEDDED_STUDENTS if is_embedded else {})
    return {**(EMBEDDED if is_embedded else {}), "tasks": ["summarization"], "methods": settings}


def smaller(config: PreTrainedConfig, of_students: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings that compare ways to a smaller model: a teacher, students of half its layers, and shrunk models.

    The students start from layers of the model that the teacher starts from: `student` learns from the data alone, the
    others from the teacher too.

    Args:
        config: Of that model.
        of_students: Further arguments of every student.
    """
    half = {"peft_method": "full", "shrink_to": half_of_layers(config), "shrink_kwargs": ONCE, **of_students}
    teacher = {"name": "teacher", "peft_method": "full"}
    student = {"name": "student", **half, "teacher_model": "none"}
    taught = [
        {"name": f"student_{name}", **half, "teacher_model": "{teacher}", "distillation_kwargs": options}
        for name, options in LOSSES.items()
    ]
    shrunk = [
        {"name": f"{name}_{size}", "peft_method": "full", "shrink_to": f"params={size}", "shrink_kwargs": schedule}
        for size in SIZES
        for name, schedule in (("one_shot", ONCE), ("progressive", "schedule=cubic"))
    ]
    return [teacher, student, *taught, *shrunk]


def half_of_layers(config: PreTrainedConfig) -> str:
    """`shrink_to` for half of a model's layers; of an odd number of each, the encoder keeps the larger half."""
    layers = stack_layers(config)
    if "encoder" not in layers:
        return f"layers={max(1, layers['decoder'] // 2)}"
    return f"encoder_layers={-(-layers['encoder'] // 2)},decoder_layers={max(1, layers['decoder'] // 2)}"
