"""A plain LoRA of one rank and scaling 1, which PEFT loads and vLLM serves."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

from peft import PeftModel
from peft.utils import CONFIG_NAME

from left_trainer.adapters.run_settings import BASE_FOLDER
from left_trainer.export.formats import Answers, Trained
from left_trainer.export.greedy import hugging_face_answers
from left_trainer.export.verification import EXACT, HALF, ROUNDED
from left_trainer.methods.fit import saved_weights
from left_trainer.methods.plain_lora import PlainLora, lora_kind, other_weights, plain_lora
from left_trainer.models import load_model

# What vLLM's --max-lora-rank takes.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def factors_of(trained: Trained) -> PlainLora:
    """The adapter of `trained` as a plain LoRA. Raises `ValueError` where it cannot be one, with what to do."""
    model = trained.reference.generator.model
    try:
        others = other_weights(saved_weights(str(trained.path)), model)
        if others:
            raise ValueError(f"it trained more than the change of single layers ({', '.join(others[:4])})")
        return plain_lora(model, trained.rank)
    except ValueError as error:
        raise ValueError(
            f"{str(trained.path)!r} cannot be written as a plain LoRA: {error}. Merge it instead: --to merged."
        ) from error


def write(trained: Trained, folder: Path) -> None:
    """Write adapter, tokenizer and, where it was saved with the adapter, the base."""
    lora = factors_of(trained)
    base, task_type = trained.source.base_name, trained.source.adapter.task_type  # type: ignore[union-attr]
    lora.write(folder, base, task_type)
    trained.reference.tokenizer.save_pretrained(folder)
    if trained.source.has_base_beside:
        shutil.copytree(base, folder / BASE_FOLDER)
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        # PEFT reads the name as it stands; a folder of that name beside the adapter is found wherever it is moved to.
        config["base_model_name_or_path"] = BASE_FOLDER
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def answers(trained: Trained, folder: Path) -> Answers:
    """Those of plain PEFT on the base model, loaded as the run did."""
    model = PeftModel.from_pretrained(load_model(trained.source), str(folder))
    return hugging_face_answers(model.eval(), trained.reference)


def tolerance(trained: Trained) -> float:
    """That of rounding where nothing is left out, and of an approximation otherwise."""
    if lora_kind(trained.reference.generator.model) != "exact":
        return ROUNDED
    return EXACT if trained.precision == "float32" else HALF


def runtime() -> str:
    """Name and version."""
    return f"peft {version('peft')}"


def usage(trained: Trained, folder: Path) -> str:
    """Code that loads it."""
    base = folder / BASE_FOLDER if trained.source.has_base_beside else trained.source.base_name
    load = f"PeftModel.from_pretrained(base, {str(folder)!r})"
    if trained.source.family == "encoder_decoder":
        return load
    rank = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["r"]
    allowed = next((each for each in VLLM_RANKS if each >= rank), None)
    if allowed is None:
        return f"{load}  # vLLM serves ranks up to {VLLM_RANKS[-1]}, and this one has {rank}: lower it with --rank"
    tokenizer = f" --tokenizer {folder}" if trained.source.has_base_beside else ""  # which lies beside the adapter
    serve = f"vllm serve {base}{tokenizer} --enable-lora --max-lora-rank {allowed}"
    return f"{load}\n{serve} --lora-modules mine={folder}"
