"""Command-line arguments that say which model and which data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from left_trainer.embedded import DEFAULT_MODEL, LEARNING_RATE_FACTOR, MODEL_NAMES
from left_trainer.models.source import ModelSource
from left_trainer.training_args import LeftTrainingArguments, loading_options


@dataclass
class ModelArguments:
    """Which model.

    Args:
        model_name_or_path: Hub name or path of a model or an adapter; `embedded/t5` or `embedded/llama`.
        model_revision: Branch, tag or commit on the hub.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for the one the checkpoint was saved in.
        token: Hub token for private models; by default the one of `hf auth login`.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub name or path of a model or adapter, embedded/t5 or embedded/llama. Unset: embedded/t5."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the weights.", "choices": ["float32", "bfloat16", "float16", "auto"]},
    )
    token: str | None = field(default=None, metadata={"help": "Hub token for private models and data."})

    def source(self, args: LeftTrainingArguments) -> ModelSource:
        """The model to load: its config is read, its weights are not.

        An embedded model is far narrower than those that the methods' default learning rates are for; unset, its rate
        is `LEARNING_RATE_FACTOR` times the default.

        Args:
            args: `model_init_kwargs` and `trust_remote_code` are read, and beat the fields here.

        Raises:
            ValueError: There is no such model, or it does not generate text.
        """
        given: dict[str, Any] = {"dtype": self.dtype, "revision": self.model_revision, "token": self.token}
        options = {name: value for name, value in given.items() if value is not None} | loading_options(args)
        name = self.model_name_or_path or DEFAULT_MODEL
        factor = LEARNING_RATE_FACTOR if name in MODEL_NAMES else 1.0
        return ModelSource.of(MODEL_NAMES.get(name, name), options, factor)


@dataclass
class DataArguments:
    """Which data. Without a name or a file, the task's generated data.

    Args:
        dataset_name: Data set on the hub, or a local folder that `datasets.load_dataset` reads.
        dataset_config_name: Its configuration.
        train_file: JSONL, CSV or Parquet file.
        validation_file: The same; without one, 5 percent of the training rows are held out.
        test_file: The same; scored before and after training. Without one, the validation rows are.
        source_column: Column that the model reads; by default the task's, or that of the task's hub data set. A dot
            goes into a nested column, `translation.en`.
        target_column: Column that it learns to write; the same.
        prompt: Template with `{source}`; by default the task's.
        max_train_samples: Use only the first rows.
        max_eval_samples: Use only the first rows of validation and test.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the hub, or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(default=None, metadata={"help": "Training rows: JSONL, CSV or Parquet."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Validation rows. Unset: 5 percent of the training rows are held out."}
    )
    test_file: str | None = field(
        default=None, metadata={"help": "Rows scored before and after training. Unset: the validation rows."}
    )
    source_column: str | None = field(default=None, metadata={"help": "Column to read. Unset: the task's own."})
    target_column: str | None = field(default=None, metadata={"help": "Column to write. Unset: the task's own."})
    prompt: str | None = field(
        default=None, metadata={"help": "Prompt template with {source} where the text goes. Unset: the task's own."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first N training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first N evaluation rows."})
