"""A script in the shape of Hugging Face's `run_translation.py`: sentence pairs, and a tokenizer with languages."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    MBart50Tokenizer,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    default_data_collator,
    set_seed,
)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Model or name on the hub."})
    trust_remote_code: bool = field(default=False)


@dataclass
class DataTrainingArguments:
    train_file: str = field(metadata={"help": "JSON lines with a column `translation`."})
    source_lang: str = field(default="en_XX")
    target_lang: str = field(default="fr_XX")
    forced_bos_token: str | None = field(default="fr_XX")
    max_source_length: int = field(default=32)
    max_target_length: int = field(default=32)
    pad_to_max_length: bool = field(default=True)
    num_beams: int = field(default=2)


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, Seq2SeqTrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    raw = load_dataset("json", data_files={"train": data_args.train_file, "validation": data_args.train_file})

    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(model_args.model_name_or_path, config=config)
    if isinstance(tokenizer, MBart50Tokenizer):
        tokenizer.src_lang = data_args.source_lang
        tokenizer.tgt_lang = data_args.target_lang
        model.generation_config.forced_bos_token_id = tokenizer.lang_code_to_id[data_args.forced_bos_token]

    source_lang, target_lang = data_args.source_lang.split("_")[0], data_args.target_lang.split("_")[0]
    padding = "max_length" if data_args.pad_to_max_length else False

    def preprocess_function(examples):
        inputs = [pair[source_lang] for pair in examples["translation"]]
        targets = [pair[target_lang] for pair in examples["translation"]]
        model_inputs = tokenizer(inputs, max_length=data_args.max_source_length, padding=padding, truncation=True)
        labels = tokenizer(
            text_target=targets, max_length=data_args.max_target_length, padding=padding, truncation=True
        )
        if padding == "max_length":
            labels["input_ids"] = [
                [(label if label != tokenizer.pad_token_id else -100) for label in ids] for ids in labels["input_ids"]
            ]
        model_inputs["labels"] = labels["input_ids"]
        return model_inputs

    datasets = raw.map(preprocess_function, batched=True, remove_columns=raw["train"].column_names)
    if data_args.pad_to_max_length:
        data_collator = default_data_collator
    else:
        data_collator = DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=-100)

    def compute_metrics(eval_preds):
        preds, labels = eval_preds
        preds = np.where(preds != -100, preds, tokenizer.pad_token_id)
        labels = np.where(labels != -100, labels, tokenizer.pad_token_id)
        decoded_preds = [pred.strip() for pred in tokenizer.batch_decode(preds, skip_special_tokens=True)]
        decoded_labels = [[label.strip()] for label in tokenizer.batch_decode(labels, skip_special_tokens=True)]
        pairs = zip(decoded_preds, decoded_labels, strict=True)
        return {"letters_in_common": sum(len({*pred} & {*label[0]}) for pred, label in pairs)}

    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        processing_class=tokenizer,
        data_collator=data_collator,
        compute_metrics=compute_metrics if training_args.predict_with_generate else None,
    )

    train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", train_result.metrics)
    trainer.save_metrics("train", train_result.metrics)
    trainer.save_state()

    metrics = trainer.evaluate(max_length=12, num_beams=data_args.num_beams, metric_key_prefix="eval")
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    predict_results = trainer.predict(
        datasets["validation"], metric_key_prefix="predict", max_length=12, num_beams=data_args.num_beams
    )
    trainer.save_metrics("predict", predict_results.metrics)

    kwargs = {"finetuned_from": model_args.model_name_or_path, "tasks": "translation"}
    languages = [lang for lang in (source_lang, target_lang) if lang is not None]
    trainer.create_model_card(**kwargs, language=languages)


if __name__ == "__main__":
    main()
