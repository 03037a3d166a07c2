"""How a run loaded its model and cut its prompts: what a later use of its folder has to repeat.

PEFT's config names the base model, but neither the options that it was loaded with nor its dtype nor its quantization.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from left_trainer.adapters.text_files import write_whole
from left_trainer.secret_values import without_secrets

SETTINGS_FILE = "run_settings.json"
BASE_FOLDER = "base"  # with the base model, where an adapter fits another one than its name loads
# Options that let code of the base model, or of a repository that they name, run.
RUNS_CODE = ("trust_remote_code", "attn_implementation", "experts_implementation", "use_kernels", "kernel_config")


@dataclass(frozen=True)
class RunSettings:
    """What stands in `run_settings.json`.

    Args:
        method: Name of what was trained; `None` for a PEFT config without a record.
        dtype: Of the base model's weights in training, `float32` for example.
        model_init_kwargs: Options that say which base model it is: revision, quantization, fields of its config.
        max_length: As in the training arguments.
        truncation_mode: As in the training arguments.
        per_device_eval_batch_size: As in the training arguments.
    """

    method: str | None = None
    dtype: str | None = None
    model_init_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    per_device_eval_batch_size: int | None = None

    @property
    def loading_options(self) -> dict[str, Any]:
        """For `from_pretrained` of the base model. A file consents to nothing: whoever loads it has to."""
        which = {name: value for name, value in self.model_init_kwargs.items() if name not in RUNS_CODE}
        return {**({"dtype": self.dtype} if self.dtype else {}), **which}

    def write(self, directory: str | Path) -> None:
        """Write the file into `directory`, whole."""
        write_whole(Path(directory) / SETTINGS_FILE, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, directory: str | Path) -> RunSettings | None:
        """What the file in `directory` says; `None` where there is none.

        Raises:
            ValueError: The file cannot be read.
        """
        path = Path(directory) / SETTINGS_FILE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known = {item.name for item in dataclasses.fields(cls)}
            settings = cls(**{name: value for name, value in content.items() if name in known})
            dict(settings.model_init_kwargs)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{str(path)!r} is not a record of a run: {error}. Remove it to load the folder without it."
            ) from error
        return settings


def storable(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that JSON can hold and that may be kept."""
    kept = {}
    for name, value in without_secrets(dict(options)).items():
        try:
            kept[name] = json.loads(json.dumps(value))
        except TypeError:
            continue
    return kept
