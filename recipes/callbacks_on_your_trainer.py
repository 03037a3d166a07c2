"""Track memory and parameters, and save small, safe adapters, in your own training script.

    accelerate launch recipes/callbacks_on_your_trainer.py

Add the lines marked `# *` to your script: three callbacks that only observe, for any `Trainer`, `Seq2SeqTrainer` or
`SFTTrainer`. The run writes `memory.png` and, in `adapters/`, one adapter for each save and a link to the best; load
them with `PeftModel.from_pretrained`. The measurements are in `trainer.state.log_history`. On your data:

    accelerate launch recipes/callbacks_on_your_trainer.py --model_name_or_path google/flan-t5-small \
        --train_file train.jsonl --source_column document --target_column summary

`--peft_method` accepts any method that only wraps the model. Methods that also act during training, such as AdaLoRA
with its schedule or LoRA+ with its optimizer, need `LeftTrainer` and are refused here.
"""

from dataclasses import dataclass

from datasets import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from left_trainer import AdapterSaverCallback, MemoryProfilerCallback, TrainableParametersCallback  # *

# isort: split
# What this script trains: the embedded model and data, with a method of the library.
from left_trainer import (
    MODEL_PATHS,
    DataArguments,
    ScriptParser,
    apply_method,
    get_method,
    get_task,
    load_task_data,
    user_errors,
)


@dataclass
class ScriptArguments(DataArguments):
    """Files, columns, model and method."""

    model_name_or_path: str = str(MODEL_PATHS["encoder_decoder"])
    peft_method: str = "lora"
    peft_kwargs: str | None = None


def main() -> None:
    with user_errors():
        parser = ScriptParser((ScriptArguments, Seq2SeqTrainingArguments))
        parser.set_defaults(output_dir="outputs/callbacks_on_your_trainer", learning_rate=None, num_train_epochs=1)
        parser.set_defaults(per_device_train_batch_size=16, eval_strategy="steps", eval_steps=0.5, save_steps=0.5)
        parser.set_defaults(
            metric_for_best_model="loss", logging_steps=0.1, report_to="none", dataloader_pin_memory=False
        )
        script, args = parser.parse_args_into_dataclasses()
        method = get_method(script.peft_method)
        if not method.only_wraps:
            parser.error(f"--peft_method {method.name} does more than wrap the model. Use it with LeftTrainer.")
        args.learning_rate = args.learning_rate or method.learning_rate

        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
        data = load_task_data(get_task("summarization"), script)  # any rows with the columns source and target

    def tokenize(rows: Dataset) -> Dataset:
        prompts = [f"Summarize: {source}" for source in rows["source"]]
        return Dataset.from_dict(tokenizer(prompts, text_target=list(rows["target"]), truncation=True))

    model = AutoModelForSeq2SeqLM.from_pretrained(script.model_name_or_path)
    trainer = Seq2SeqTrainer(
        # Returns the PeftModel of PEFT's get_peft_model, with the method's defaults and checked target modules.
        apply_method(model, script.peft_method, script.peft_kwargs, seed=args.seed),
        args,
        train_dataset=tokenize(data["train"]),
        eval_dataset=tokenize(data["validation"]),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[TrainableParametersCallback(), MemoryProfilerCallback(), AdapterSaverCallback()],  # *
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    metrics = {"eval_loss_before": before, **trainer.evaluate()}
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
