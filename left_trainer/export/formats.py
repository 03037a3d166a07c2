"""What a trained model can be exported to: one record each."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from left_trainer.export.verification import EXACT, HALF, ROUNDED
from left_trainer.methods.method import PeftMethod
from left_trainer.methods.plain_lora import Kind
from left_trainer.models import FAMILIES, ModelFamily
from left_trainer.registry import did_you_mean

if TYPE_CHECKING:
    from left_trainer.export.greedy import Reference
    from left_trainer.models import ModelSource

Answers = list[list[int]]


@dataclass(frozen=True)
class Trained:
    """A trained model that is to be written in another format.

    Args:
        path: Folder of the run.
        source: The same, looked at.
        reference: What it answers, with its tokenizer and the loaded model.
        precision: Of the weights that are written, a key of the format's `precisions`.
        rank: Of an approximated LoRA, as `plain_lora` takes it.
        as_adapter: Write the adapter alone.
        plain: Folder of the merged model, in transformers' layout; `None` where the format takes the adapter.
    """

    path: Path
    source: ModelSource
    reference: Reference
    precision: str
    rank: int | float | None = None
    as_adapter: bool = False
    plain: Path | None = None


@dataclass(frozen=True)
class ExportFormat:
    """A format, and the runtime that verifies it.

    Args:
        name: What a user writes in `--to`.
        summary: One line for tables.
        module: Of this package. `write(trained, folder)` writes the files; `answers(trained, folder)` loads them in the
            runtime and returns the token ids of each greedy answer; `runtime()` is its name and version, and
            `usage(trained, folder)` code that loads them.
        precisions: Of the weights, each with the tolerance of the verification; empty where they keep theirs, and the
            module has `tolerance(trained)`.
        families: Of models.
        model_types: That are known to work; `None` for all.
        packages: What to install, by the name that is imported.
        takes_adapter: Whether it is made of the adapter and not of the merged model.
        otherwise: What to do where a model is not supported.
    """

    name: str
    summary: str
    module: str
    precisions: Mapping[str, float] = field(default_factory=dict)
    families: tuple[ModelFamily, ...] = FAMILIES
    model_types: tuple[str, ...] | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    takes_adapter: bool = False
    otherwise: str = "Export it with --to merged."

    @property
    def code(self) -> Any:
        """The module that writes it; imported when it is needed."""
        return importlib.import_module(f"left_trainer.export.{self.module}")

    def check_installed(self) -> None:
        """Raise `ImportError` where a package is missing."""
        missing = [package for module, package in self.packages.items() if find_spec(module) is None]
        if missing:
            raise ImportError(
                f"--to {self.name} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
                f"installed. Run: pip install 'left_trainer[{self.name}]'"
            )


ROUNDING = {"float32": EXACT, "bfloat16": HALF, "float16": HALF}
FORMATS = {
    record.name: record
    for record in (
        ExportFormat("merged", "the whole model in transformers' layout", "to_merged"),
        ExportFormat(
            "ctranslate2",
            "CTranslate2, for fast inference on CPU and GPU",
            "to_ctranslate2",
            {
                **ROUNDING,
                "int16": HALF,
                **dict.fromkeys(("int8", "int8_float32", "int8_float16", "int8_bfloat16"), ROUNDED),
            },
            model_types=(
                *("t5", "mt5", "umt5", "bart", "mbart", "marian", "pegasus", "m2m_100"),
                *("llama", "mistral", "qwen2", "qwen3", "gpt2", "opt"),
            ),
            packages={"ctranslate2": "ctranslate2"},
        ),
        ExportFormat(
            "gguf",
            "GGUF, for llama.cpp and what is built on it",
            "to_gguf",
            {"f32": EXACT, "bf16": HALF, "f16": HALF, "q8_0": ROUNDED},
            families=("decoder_only",),
            model_types=("llama", "mistral", "qwen2", "qwen3", "gpt2"),
            packages={"gguf": "gguf"},
            otherwise="Export it with --to merged and try llama.cpp's own convert_hf_to_gguf.py on the result.",
        ),
        ExportFormat(
            "onnx",
            "ONNX without a cache of keys and values, for ONNX Runtime",
            "to_onnx",
            {"float32": EXACT},
            packages={"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"},
            otherwise=(
                "Export it with --to merged, and that with optimum in an environment of its own: optimum-cli export "
                "onnx --model MERGED ONNX"
            ),
        ),
        ExportFormat("lora", "a plain LoRA of one rank, for vLLM and PEFT", "to_lora", takes_adapter=True),
    )
}
# What has an environment of its own, since its packages do not fit ours: what to run there.
ELSEWHERE = {
    "optimum": (
        "optimum, whose packages do not fit transformers 5. Run here: left-trainer export --adapter {adapter} --to "
        "merged --output_dir merged. Then in an environment of its own: pip install 'optimum[onnxruntime]' && "
        "optimum-cli export onnx --model merged onnx"
    ),
    "vllm": (
        "vLLM, which pins its own torch. Run here: left-trainer export --adapter {adapter} --to lora --output_dir "
        "lora. Then in an environment of its own: pip install vllm && vllm serve BASE --enable-lora --lora-modules "
        "mine=lora"
    ),
}


def get_format(name: str, adapter: str) -> ExportFormat:
    """The format called `name`. Raises `ValueError` where there is none, or where it is made elsewhere."""
    if name in ELSEWHERE:
        raise ValueError(f"--to {name} is made by {ELSEWHERE[name].format(adapter=adapter)}")
    if name not in FORMATS:
        raise ValueError(f"--to {name!r} is not known.{did_you_mean(name, FORMATS)} Allowed: {', '.join(FORMATS)}.")
    return FORMATS[name]


def formats_of(method: PeftMethod, as_lora: Kind | None) -> tuple[str, ...]:
    """Names of the formats that a model trained with `method` can be exported to, where its type fits.

    Args:
        method: The record.
        as_lora: How its adapter can be written as a plain LoRA.
    """
    if method.config_class is None:  # a whole model is saved already
        return tuple(name for name, record in FORMATS.items() if not record.takes_adapter and name != "merged")
    return tuple(
        name for name, record in FORMATS.items() if (as_lora is not None if record.takes_adapter else method.mergeable)
    )


def check_model(record: ExportFormat, family: ModelFamily, model_type: str, path: str) -> None:
    """Raise `ValueError` where `record` is not for models of this kind."""
    others = [
        name
        for name, other in FORMATS.items()
        if other is not record
        and not other.takes_adapter
        and name != "merged"
        and family in other.families
        and model_type in (other.model_types or (model_type,))
    ]
    if family not in record.families:
        kind = " or ".join(family.replace("_", "-") for family in record.families)
        raise ValueError(
            f"--to {record.name} is for {kind} models, and {path!r} holds a {model_type}. Export it with --to "
            f"{' or '.join(others)}."
        )
    if record.model_types is not None and model_type not in record.model_types:
        raise ValueError(
            f"--to {record.name} knows {', '.join(record.model_types)}, and {path!r} holds a {model_type}. "
            f"{record.otherwise} It can also be exported with --to {' or '.join(others)}."
        )


def check_precision(record: ExportFormat, precision: str | None) -> None:
    """Raise `ValueError` where `record` has no such precision."""
    if precision is not None and precision not in record.precisions:
        allowed = f"Allowed: {', '.join(record.precisions)}." if record.precisions else "It keeps the run's: remove it."
        raise ValueError(f"--quantization {precision!r} is not one of --to {record.name}. {allowed}")


def default_precision(record: ExportFormat, dtype: str) -> str:
    """The precision that keeps weights of `dtype`, `float32` say; the first one where none does."""
    short = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
    known: Sequence[str] = list(record.precisions) or [dtype]
    return next((name for name in (dtype, short.get(dtype, dtype)) if name in known), known[0])
