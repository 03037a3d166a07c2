"""What makes every method learn something on models of a few thousand parameters, in a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from left_trainer import apply_method, get_method, list_methods
from left_trainer.models import model_family
from tiny import FAMILY_TYPES, tiny_model, tiny_tokenizer

# Options beside the method's own defaults. Every registered method has an entry; a new one without fails the suite.
SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"peft_kwargs": {"init_r": 4, "target_r": 2}, "learning_rate": 2e-2},
    "adamss": {"learning_rate": 2e-2},
    "adaption_prompt": {"learning_rate": 1e-1},
    "beft": {"learning_rate": 1e-1},
    "boft": {"learning_rate": 2e-2},
    "c3a": {"learning_rate": 1e-1},
    "cartridge": {"peft_kwargs": {"num_virtual_tokens": 4}, "learning_rate": 1e-1},
    "corda": {"learning_rate": 2e-2},
    "cpt": {"peft_kwargs": {"opt_projection_epsilon": 1.0}, "learning_rate": 3e-2},
    "deft": {"learning_rate": 2e-2},
    "delora": {"learning_rate": 1e-2},
    "dora": {"learning_rate": 2e-2},
    "bitfit": {"learning_rate": 5e-2},
    "layers": {"peft_kwargs": {"layers": "last:1"}, "learning_rate": 1e-2},
    "parameter_types": {"learning_rate": 1e-2},
    "p_tuning_v2": {"peft_kwargs": {"num_virtual_tokens": 4}, "learning_rate": 1e-1},
    "houlsby_adapter": {"peft_kwargs": {"reduction_factor": 2}, "learning_rate": 1e-2},
    "pfeiffer_adapter": {"peft_kwargs": {"reduction_factor": 2}, "learning_rate": 1e-2},
    "parallel_adapter": {"peft_kwargs": {"reduction_factor": 2}, "learning_rate": 1e-2},
    "eva": {"learning_rate": 2e-2, "peft_kwargs": {"r": 2, "eva_config": {"rho": 2.0}}},
    "fourierft": {"learning_rate": 1e-1},
    "frod": {"learning_rate": 2e-2},
    "full": {"learning_rate": 1e-2},
    "glora": {"learning_rate": 2e-2},
    "gralora": {"learning_rate": 2e-2},
    "hira": {"learning_rate": 2e-2},
    "hra": {"learning_rate": 2e-2},
    "ia3": {"learning_rate": 5e-2},
    "lily": {"learning_rate": 1e-2},
    "ln_tuning": {"learning_rate": 5e-2},
    "loftq": {"learning_rate": 2e-2},
    "loha": {"learning_rate": 5e-2},
    "lokr": {"learning_rate": 5e-2},
    "lora": {"learning_rate": 2e-2},
    "lora_fa": {"learning_rate": 2e-2},
    "lora_ga": {"learning_rate": 1e-2},
    "lora_plus": {"learning_rate": 2e-3},
    "miss": {"learning_rate": 2e-2},
    "multitask_prompt_tuning": {"peft_kwargs": {"num_virtual_tokens": 4}, "learning_rate": 3e-2},
    "oft": {"learning_rate": 2e-2},
    "olora": {"learning_rate": 2e-2},
    "osf": {"learning_rate": 1e-2},
    "p_tuning": {"peft_kwargs": {"num_virtual_tokens": 4, "encoder_hidden_size": 16}, "learning_rate": 2e-2},
    "peanut": {"learning_rate": 1e-2},
    "pissa": {"learning_rate": 2e-2},
    "poly": {"learning_rate": 2e-2},
    "prefix_tuning": {"peft_kwargs": {"num_virtual_tokens": 4}, "learning_rate": 1e-1},
    "prompt_tuning": {"peft_kwargs": {"num_virtual_tokens": 4}, "learning_rate": 3e-1},
    "psoft": {"learning_rate": 2e-2},
    "pvera": {"learning_rate": 5e-2, "peft_kwargs": {"r": 8}},
    "qlora": {"learning_rate": 2e-2},
    "randlora": {"learning_rate": 5e-3},
    "road": {"learning_rate": 5e-2},
    "rslora": {"learning_rate": 1e-2},
    "shadow": {"learning_rate": 2e-2, "peft_kwargs": {"shadow_dropout": 0.0}},
    "shira": {"learning_rate": 2e-2},
    "supertuning": {"learning_rate": 1e-1},
    "tinylora": {"learning_rate": 2e-2},
    "trainable_tokens": {"peft_kwargs": {"token_indices": list(range(3, 200))}, "learning_rate": 3e-1},
    "unilora": {"learning_rate": 5e-2},
    "vblora": {"learning_rate": 3e-2, "peft_kwargs": {"num_vectors": 8}},
    "vera": {"learning_rate": 5e-2, "peft_kwargs": {"r": 8}},
    "waveft": {"learning_rate": 2e-2},
    "xlora": {"learning_rate": 5e-2},
}
CASES = [(method.name, family) for method in list_methods() for family in method.model_families]


# bitsandbytes' kernels for the CPU need dimensions of at least 64.
WIDE = {
    "t5": {"d_model": 64, "d_kv": 32, "d_ff": 64},
    "llama": {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.1},
}


class BaseModels:
    """A base model on disk for each method and family, made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, case: tuple[str, str]) -> Path:
        method, family = case
        is_wide = get_method(method).quantization is not None
        path = self.folder / f"{family}{'-wide' * is_wide}"
        if not path.exists():
            model_type = FAMILY_TYPES[family]
            tiny_model(model_type, **(WIDE[model_type] if is_wide else {})).save_pretrained(path)
            tiny_tokenizer(family).save_pretrained(path)
        return path


def settings(method: str, family: str, folder: Path) -> dict[str, Any]:
    """Training arguments for `method`. X-LoRA needs adapters to mix, which are made in `folder`."""
    options = dict(SETTINGS[method])
    if method == "xlora":
        options["peft_kwargs"] = {"adapters": two_adapters(folder / "experts")}
    return options


def apply_or_skip(method: str, model_type: str, folder: Path, **options: Any) -> PeftModel | PreTrainedModel:
    """A tiny model with `method` at its defaults and what it requires; skips where the method is not for the model."""
    record, model = get_method(method), tiny_model(model_type)
    kinds = (model_family(model), *(("conv1d",) if model_type == "gpt2" else ()))
    if any(kind in record.unsupported for kind in kinds) or (method == "xlora" and model_type != "llama"):
        pytest.skip(f"{method} is not for {model_type}")
    required = settings(method, model_family(model), folder).get("peft_kwargs") or {}
    needed = {name: value for name, value in required.items() if name in record.required}
    if method == "cpt":
        needed = dict(record.derive_from_data(None, [5, 6, 7]))
    return apply_method(model, method, needed, **options)


def two_adapters(folder: Path) -> dict[str, str]:
    paths = {}
    for seed, name in enumerate(("first", "second")):
        paths[name] = str(folder / name)
        if not (folder / name).exists():
            model = get_peft_model(
                tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, lora_alpha=8 * seed + 8)
            )
            model.save_pretrained(paths[name])
    return paths


def is_adapter(method: str) -> bool:
    return get_method(method).config_class is not None


def model_argument(method: str, path: Path, load: Any) -> Any:
    """What a user passes as `model`: its path where the method decides how it is loaded, else the loaded model."""
    return str(path) if get_method(method).quantization else load(path)
