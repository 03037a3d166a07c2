"""Command-line arguments for the model and the data."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from left_trainer.argument_ranges import check_fields
from left_trainer.embedded import DEFAULT_MODEL, MODEL_NAMES
from left_trainer.models.source import ModelSource
from left_trainer.registry import did_you_mean
from left_trainer.secret_values import remember
from left_trainer.training_args import LeftTrainingArguments, loading_options


@dataclass
class ModelArguments:
    """Arguments that select the model.

    Args:
        model_name_or_path: Hub name or path of a model or an adapter, `embedded/t5` or `embedded/llama`.
        model_revision: Branch, tag or commit on the Hub.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for the dtype of the checkpoint.
        token: Hub token for private models; by default the token of `hf auth login`.
        trust_remote_code: Allow code that comes with the model to run.
        pad_token: Token that fills rows up, where the tokenizer has none or another is wanted.
        pad_to_multiple_of: Fill rows up to a multiple of this number of tokens.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub name or path of a model or adapter, embedded/t5 or embedded/llama. Default: embedded/t5."
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the weights.", "choices": ["float32", "bfloat16", "float16", "auto"]},
    )
    token: str | None = field(default=None, repr=False, metadata={"help": "Hub token for private models and data."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow code that comes with the model to run. Only for models you trust."}
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Token that fills rows up. Default: the tokenizer's."}
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Fill rows up to a multiple of this number of tokens."}
    )

    def __post_init__(self) -> None:
        remember(vars(self))
        check_fields(self)

    def source(self, args: LeftTrainingArguments) -> ModelSource:
        """The model to load. Its config is read, its weights are not.

        Args:
            args: `model_init_kwargs` and `trust_remote_code` are read and override the fields of this class.

        Raises:
            ValueError: The model does not exist, or does not generate text.
        """
        given: dict[str, Any] = {"dtype": self.dtype, "revision": self.model_revision, "token": self.token}
        options = {name: value for name, value in given.items() if value is not None} | loading_options(args)
        options["trust_remote_code"] = options["trust_remote_code"] or self.trust_remote_code
        name = self.model_name_or_path or DEFAULT_MODEL
        meant = did_you_mean(name, MODEL_NAMES) if "embed" in name and not Path(name).exists() else ""
        if meant and name not in MODEL_NAMES:
            raise ValueError(f"model_name_or_path={name!r} is not known.{meant} Or pass a folder or a name on the Hub.")
        return ModelSource.of(name, options)


@dataclass
class DataArguments:
    """Arguments that select the data. Without a dataset name or a file, the task's generated data is used.

    Args:
        dataset_name: Dataset on the Hub, or a local folder that `datasets.load_dataset` can read.
        dataset_config_name: Configuration of the dataset.
        dataset_revision: Branch, tag or commit of the dataset on the Hub.
        train_file: JSONL, JSON, CSV, TSV or Parquet file with training rows, perhaps compressed (`.gz`, `.bz2`,
            `.zst`). A name is taken literally. A pattern, `part-*.jsonl`, stands for the files that match it where no
            file has that name.
        validation_file: File with validation rows. Without it, 5 percent of the training rows are held out.
        test_file: File with rows that are scored before and after training. Without it, the validation rows are used.
        encoding: Encoding of files of text; by default UTF-8, or that of the mark at the start of a file.
        overwrite_cache: Read the files anew, and all that was made of them, even where an earlier run has stored it.
        streaming: Read the training rows while training, and start at once. Needs `max_steps`. Without validation rows,
            the first 200 rows are held out.
        shuffle_buffer_size: Rows of a stream that are shuffled with each other.
        source_column: Column that the model reads; by default the column of the task or of its Hub dataset. A dot
            selects a nested column, `translation.en`.
        target_column: Column that the model learns to write; same default and form.
        prompt: Prompt template with `{source}`; by default the template of the task.
        source_lang: Language of the sources, for a tokenizer that marks texts with it (NLLB, mBART, M2M100, ...): a
            code of the tokenizer, `eng_Latn`.
        target_lang: Language of the targets, which generated texts then begin with.
        max_train_samples: Use only this number of training rows, from the start.
        max_eval_samples: Use only this number of validation and test rows, from the start.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the Hub, or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the dataset."})
    train_file: str | None = field(default=None, metadata={"help": "Training rows: JSONL, JSON, CSV, TSV or Parquet."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Validation rows. Default: 5 percent of the training rows are held out."}
    )
    test_file: str | None = field(
        default=None, metadata={"help": "Rows scored before and after training. Default: the validation rows."}
    )
    encoding: str | None = field(
        default=None, metadata={"help": "Encoding of text files: utf-16, latin-1, ... Default: UTF-8."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Read and tokenize files anew."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the training rows while training. Needs --max_steps."}
    )
    shuffle_buffer_size: int = field(
        default=10_000, metadata={"help": "Rows of a stream that are shuffled with each other."}
    )
    source_column: str | None = field(
        default=None, metadata={"help": "Column to read. Default: the column of the task."}
    )
    target_column: str | None = field(
        default=None, metadata={"help": "Column to generate. Default: the column of the task."}
    )
    prompt: str | None = field(
        default=None,
        metadata={"help": "Prompt template with {source} for the text. Default: the template of the task."},
    )
    source_lang: str | None = field(
        default=None, metadata={"help": "Language of the sources, for NLLB, mBART, M2M100 and the like: eng_Latn."}
    )
    target_lang: str | None = field(default=None, metadata={"help": "Language of the targets; as source_lang."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first N training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first N evaluation rows."})

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def given(self) -> dict[str, Any]:
        """The arguments that are not left at their defaults."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) != each.default}
