"""What a user passes as `model`, looked at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from left_trainer.adapters.run_settings import BASE_FOLDER, RunSettings, storable
from left_trainer.embedded import MODEL_NAMES
from left_trainer.models.family import ModelFamily, model_family
from left_trainer.models.folder_files import check_folder, reading
from left_trainer.models.hub import (
    ADAPTER_CONFIG_FILE,
    OF_THE_REPOSITORY,
    HubRefusalError,
    adapter_folder,
    asking_hub,
)

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
# Options that say which base model it is, beside fields of its config. Consent to run code is not among them.
BASE_ARGUMENTS = ("revision", "subfolder", "variant")
# Fields of the config that say how to compute, and not which model it is.
NOT_OF_THE_BASE = ("attn_implementation", "experts_implementation")
# What `AutoModel` keeps from the config, which would take them for fields of its own.
NOT_FOR_CONFIG = ("dtype", "torch_dtype", "quantization_config")


@dataclass(frozen=True, eq=False)
class ModelSource:
    """A model that is to be trained or used: its config, its family, and how its weights are loaded.

    Made once for a run. Whoever needs to know something about the model asks this, so that the hub is asked once.

    Args:
        model: What the user passed: a hub name, a path, a model, or a model with an adapter.
        base_name: Hub name or path of the base model's weights; the name of its class where a model has neither.
        config: Of the base model.
        family: Of the base model.
        adapter: Config of the adapter that the path holds or the model carries, if there is one.
        options: For `from_pretrained` of the weights.
        base_options: Those of the user's options that say which base model it is, as JSON values.
        settings: Of the run that wrote the folder, where the path is one's.
        hub_name: What the user passed, where that is an adapter on the hub; `model` is then the local copy.
    """

    model: str | PreTrainedModel | PeftModel
    base_name: str
    config: PreTrainedConfig
    family: ModelFamily
    adapter: PeftConfig | None
    options: Mapping[str, Any]
    base_options: Mapping[str, Any] = field(default_factory=dict)
    settings: RunSettings | None = None
    hub_name: str | None = None

    @classmethod
    def of(cls, model: Any, options: Mapping[str, Any] | None = None) -> ModelSource:
        """Look at `model`: a hub name, a path, a `PreTrainedModel` or a `PeftModel`. No weights are loaded.

        Args:
            model: What the user passed, also `embedded/t5` or `embedded/llama`. A `ModelSource` is returned as it is.
            options: For `from_pretrained`, as TRL's `model_init_kwargs`. Fields of the config are set on the config.
                All beat what a run has noted of its base model beside an adapter.

        Raises:
            TypeError: Something else was passed.
            ValueError: There is no such model, or it does not generate text.
        """
        if isinstance(model, ModelSource):
            return model
        if isinstance(model, os.PathLike):
            model = os.fspath(model)
        if not isinstance(model, (str, PreTrainedModel, PeftModel)):
            raise TypeError(
                f"model is a {type(model).__name__}. Pass a hub name, a path, a PreTrainedModel or a PeftModel, for "
                "example LeftTrainer('google/flan-t5-small', args, ...)."
            )
        if isinstance(model, str):
            return cls._of_name(MODEL_NAMES.get(model, model), options or {})
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        adapter = model.active_peft_config if isinstance(model, PeftModel) else None
        base_name = base.config._name_or_path or type(base).__name__
        return cls(model, base_name, base.config, model_family(base), adapter, options or {})

    @classmethod
    def _of_name(cls, model: str, options: Mapping[str, Any]) -> ModelSource:
        folder = adapter_folder(model, options)
        if folder is None:
            return cls._of_path(model, options)
        # Revision and subfolder are those of the adapter. The ones of its base stand in its config.
        of_base = {key: value for key, value in options.items() if key not in OF_THE_REPOSITORY}
        return replace(cls._of_path(folder, of_base), hub_name=model)

    @classmethod
    def _of_path(cls, model: str, options: Mapping[str, Any]) -> ModelSource:
        check_folder(model, is_adapter_directory(model))
        adapter, settings = None, RunSettings.read(model)
        if is_adapter_directory(model):
            adapter = _adapter_config(model)
            revision = {"revision": adapter.revision} if adapter.revision else {}
            options = {**(settings.loading_options if settings else {}), **revision, **options}
        elif settings and settings.dtype:
            options = {"dtype": settings.dtype, **options}
        base_name = _base_of(model, adapter) if adapter else model
        if adapter:
            check_folder(base_name, is_adapter=False)
        config, unused = _load_config(base_name, options)
        if getattr(config, "quantization_config", None) is not None:
            unused.pop("quantization_config", None)  # the weights on disk are quantized, and say how
        of_base = {key for key in options if key in BASE_ARGUMENTS or key not in {*unused, *NOT_OF_THE_BASE}}
        named = {key: options[key] for key in of_base - {"quantization_config"} if options[key] is not None}
        return cls(
            model,
            base_name,
            config,
            model_family(config),
            adapter,
            unused,
            storable(named),
            settings,
        )

    @property
    def is_loaded(self) -> bool:
        """Whether the user passed a model and not the name of one."""
        return not isinstance(self.model, str)

    @property
    def width(self) -> int | None:
        """Size of the hidden states, of the decoder in an encoder-decoder model; `None` where the config has no one."""
        return getattr(self.config.get_text_config(decoder=True), "hidden_size", None)

    @property
    def has_base_beside(self) -> bool:
        """Whether the adapter's base is no model of another place, but was saved with the adapter."""
        return self.adapter is not None and Path(self.base_name) == Path(str(self.model)) / BASE_FOLDER

    @property
    def is_quantized(self) -> bool:
        """Whether the base model's own weights are quantized, or will be by the options that they are loaded with."""
        given = self.options.get("quantization_config")
        return given is not None or getattr(self.config, "quantization_config", None) is not None

    @property
    def title(self) -> str:
        """The model in a sentence: the name or path that the user passed, or the model's class."""
        return self.hub_name or (self.model if isinstance(self.model, str) else type(self.model).__name__)

    @property
    def hub_options(self) -> dict[str, Any]:
        """The options that say what to ask the hub for."""
        return {name: value for name, value in self.options.items() if name in HUB_ARGUMENTS}

    @property
    def trust_remote_code(self) -> bool:
        """Whether code that comes with the model may run."""
        return bool(self.options.get("trust_remote_code", False))


def is_adapter_directory(path: str) -> bool:
    """Whether a local folder holds an adapter."""
    return (Path(path) / ADAPTER_CONFIG_FILE).is_file()


def _adapter_config(folder: str) -> PeftConfig:
    """The config of the adapter in a folder. Raises `ValueError` where it cannot be read."""
    with reading("model", folder):
        config = PeftConfig.from_pretrained(folder)
        if not isinstance(config.base_model_name_or_path, str):
            raise ValueError(f"{ADAPTER_CONFIG_FILE} names no base model (base_model_name_or_path).")
    return config


def _base_of(folder: str, adapter: PeftConfig) -> str:
    """What an adapter's config calls its base; one that was saved beside it is found where the folder is now."""
    name: str = adapter.base_model_name_or_path
    beside = Path(folder) / BASE_FOLDER
    return str(beside) if Path(name).name == BASE_FOLDER and (beside / "config.json").is_file() else name


def _load_config(name: str, options: Mapping[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The config of a hub name or path, and the options that remain for the weights: some are fields of the config."""
    for_config = {key: value for key, value in options.items() if key not in NOT_FOR_CONFIG}
    try:
        with asking_hub("model", name, revision=options.get("revision")):
            config, unused = AutoConfig.from_pretrained(name, return_unused_kwargs=True, **for_config)
    except HubRefusalError:
        raise
    except Exception as error:  # a broken file raises whatever it breaks
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model={name!r} contains custom code, which would run on this machine. Read it first, then pass "
                "--trust_remote_code (trust_remote_code=True in Python)."
            ) from error
        raise ValueError(
            f"model={name!r} is neither a directory with a config.json nor the name of a model on the Hugging Face "
            "hub (for a private model pass a token: `hf auth login`, or model_init_kwargs={'token': ...}). "
            f"The loader said: {' '.join(str(error).split())[:300]}"
        ) from error
    kept = {*unused, *HUB_ARGUMENTS, *NOT_FOR_CONFIG, "trust_remote_code"}
    return config, {key: value for key, value in options.items() if key in kept}
