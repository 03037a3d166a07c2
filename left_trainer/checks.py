"""What can be refused before any weight is loaded."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from left_trainer.methods import PeftMethod
from left_trainer.methods.apply import check_packages
from left_trainer.methods.method import Feature
from left_trainer.methods.options import parse_peft_kwargs
from left_trainer.models import HUB_ARGUMENTS, ModelFamily, load_config
from left_trainer.task_ids import TASK_IDS, number_of_tasks
from left_trainer.training_args import LeftTrainingArguments, loading_options

RESULT_FILES = (ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
FP16_OVERFLOW_TYPES = ("t5", "mt5", "umt5", "longt5", "switch_transformers")
TRAINER_STATE_FILE = "trainer_state.json"


def check_output_dir(args: LeftTrainingArguments) -> None:
    """Raise unless `output_dir` can be written and holds no earlier result that the run would replace."""
    directory = Path(args.output_dir or "")
    found = [name for name in RESULT_FILES if (directory / name).exists()]
    if found and not (args.overwrite_output_dir or args.resume_from_checkpoint):
        raise FileExistsError(
            f"output_dir={str(directory)!r} already holds {found[0]} of an earlier run. Choose another directory, go "
            "on with that run by resume_from_checkpoint, or replace it with overwrite_output_dir=True "
            "(--overwrite_output_dir)."
        )
    existing = directory
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise PermissionError(
            f"output_dir={str(directory)!r} cannot be written: {str(existing)!r} says {error.strerror!r}. Choose "
            "another output_dir."
        ) from error


def clear_checkpoints(args: LeftTrainingArguments) -> None:
    """Raise when a fresh run would write among the checkpoints of an earlier one; remove those if told to overwrite.

    Left there, they would be what a later resume finds.
    """
    checkpoints = sorted(Path(args.output_dir or "").glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    if checkpoints and not args.overwrite_output_dir:
        raise FileExistsError(
            f"output_dir={args.output_dir!r} holds {checkpoints[-1].name} of an earlier run. Go on with it by "
            "train(resume_from_checkpoint=True), choose another directory, or replace it with "
            "overwrite_output_dir=True (--overwrite_output_dir)."
        )
    if args.process_index == 0:
        for checkpoint in checkpoints:
            shutil.rmtree(checkpoint)


def last_complete_checkpoint(output_dir: str) -> str:
    """The newest checkpoint that was written to its end.

    `Trainer` writes `trainer_state.json` last, so a directory without it was cut off by a kill. Raises
    `FileNotFoundError` when there is none.
    """
    checkpoints = [
        path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (path / TRAINER_STATE_FILE).is_file()
    ]
    if not checkpoints:
        raise FileNotFoundError(
            f"resume_from_checkpoint=True, but output_dir={output_dir!r} holds no complete checkpoint. Pass the path "
            "of one, or start afresh without resume_from_checkpoint."
        )
    return str(max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2])))


def check_devices(args: LeftTrainingArguments) -> None:
    """Refuse several GPUs in one process, which Hugging Face's trainer would wrap in `nn.DataParallel`."""
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, and nn.DataParallel would average losses over unequal "
            "numbers of tokens. Start with `accelerate launch`, or make one visible by CUDA_VISIBLE_DEVICES=0."
        )


def check_evaluation_loss(args: LeftTrainingArguments, eval_dataset: Any) -> None:
    """Refuse `eval_loss_with_generation=False` where nothing is generated, or where the loss picks the best model."""
    if args.eval_loss_with_generation:
        return
    if not args.predict_with_generate:
        raise ValueError(
            "eval_loss_with_generation=False leaves an evaluation without generation with nothing to compute. Remove "
            "it, or set predict_with_generate=True."
        )
    names = [f"{name}_loss" for name in eval_dataset] if isinstance(eval_dataset, dict) else ["loss"]
    if (args.metric_for_best_model or "").removeprefix("eval_") in names:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} (what load_best_model_at_end=True uses unless told "
            "otherwise) is not computed with eval_loss_with_generation=False. Remove that, or name another metric, for "
            "example metric_for_best_model='rougeL'."
        )


def check_precision(args: LeftTrainingArguments, config: PreTrainedConfig) -> None:
    """Refuse fp16 for models whose activations overflow it."""
    if (args.fp16 or args.mixed_precision == "fp16") and config.model_type in FP16_OVERFLOW_TYPES:
        raise ValueError(
            f"fp16=True overflows in {config.model_type.upper()} models, which were trained in bfloat16: the loss "
            "becomes NaN or learning stops. Use bf16=True."
        )


def check_method(
    args: LeftTrainingArguments, method: PeftMethod | None, family: ModelFamily, is_quantized: bool
) -> None:
    """Refuse what the method declares impossible, and missing packages.

    Args:
        args: Of the run.
        method: `None` for a PEFT config without a record, of which nothing is known.
        family: Of the model.
        is_quantized: Whether the base model is, or will be, quantized.
    """
    if method is None:
        return
    check_packages(method)
    asked: dict[Feature, tuple[bool, str, str]] = {
        family: (True, f"an {family} model", "choose another"),
        "gradient_checkpointing": (
            bool(args.gradient_checkpointing),
            "gradient_checkpointing=True",
            "set gradient_checkpointing=False, or choose another",
        ),
        "packing": (args.packing, "packing=True", "set packing=False, or choose another"),
        "quantized_base": (is_quantized, "a quantized base model", "load it unquantized, or choose another"),
    }
    for feature, (is_asked, what, fix) in asked.items():
        if is_asked and not method.supports(feature):
            raise ValueError(
                f"{what} does not work with peft_method={method.name!r}: {method.unsupported[feature]} "
                f"{fix[0].upper()}{fix[1:]} method; `left-trainer methods` lists them."
            )


def check_task_ids(args: LeftTrainingArguments, method: PeftMethod | None, family: ModelFamily, dataset: Any) -> None:
    """Refuse several tasks without a column that says which row belongs to which."""
    if method is None or number_of_tasks({**method.defaults, **parse_peft_kwargs(args.peft_kwargs)}) <= 1:
        return
    if family == "decoder_only":
        raise ValueError(
            f"peft_method={method.name!r} with several tasks needs task_ids in every batch, and TRL's collator for "
            "decoder-only models drops them. Use an encoder-decoder model, or one task."
        )
    if dataset is not None and TASK_IDS not in next(iter(dataset)):
        raise ValueError(
            f"peft_method={method.name!r} with several tasks needs to know which row belongs to which. Add a column "
            f"{TASK_IDS!r} of integers from 0 to train_dataset, or leave the number of tasks at 1."
        )


def load_tokenizer(model: str, args: LeftTrainingArguments) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside `model`, or beside the base model of an adapter that has none.

    Raises `ValueError` when there is no such model.
    """
    arguments = {key: value for key, value in loading_options(args).items() if key in HUB_ARGUMENTS}
    config = load_config(model, **arguments)
    if Path(model).is_dir() and not any(Path(model).glob("*token*")):
        model = config._name_or_path
    return AutoTokenizer.from_pretrained(model, **arguments)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, args: LeftTrainingArguments, config: PreTrainedConfig) -> None:
    """Give the tokenizer the pad token of `args`, and raise when it has none or does not fit the model."""
    if args.pad_token is not None:
        if args.pad_token not in tokenizer.get_vocab():
            raise ValueError(
                f"pad_token={args.pad_token!r} is not in the tokenizer's vocabulary. Pass a token that is."
            )
        tokenizer.pad_token = args.pad_token
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "processing_class has no pad token, so rows of different lengths cannot form a batch. Set one, for example "
            f"tokenizer.pad_token = {tokenizer.eos_token!r} in Python, or --pad_token {tokenizer.eos_token!r} on the "
            "command line."
        )
    vocab_size = config.get_text_config().vocab_size
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"processing_class has {len(tokenizer)} tokens and the model's vocabulary {vocab_size}: tokens beyond it "
            "have no embedding. Pass the tokenizer that belongs to the model, or call "
            f"model.resize_token_embeddings({len(tokenizer)}) before training."
        )
