"""Train every parameter of a language model to summarize: the reference for the other recipes.

    accelerate launch recipes/full_finetuning.py

Three things differ from the recipes with adapters:

- Memory. Gradients and Adam's two moments add 12 bytes for each float32 parameter; with an adapter, only for a few
  percent of the parameters. A model of 1 billion parameters needs 16 GB before the first activation.
- Learning rate. It is 5e-5, a quarter of LoRA's, because pretrained weights change instead of new weights beside them.
- Saved files. The whole model is saved. `AutoModelForSeq2SeqLM.from_pretrained("outputs/full_finetuning")` loads it
  without PEFT, and there is nothing to merge, but every task takes the disk space of a whole model.

On your own model and data, with less memory: recomputed activations, Adafactor, and accumulated small batches.

    accelerate launch recipes/full_finetuning.py --model_name_or_path google/flan-t5-small \
        --train_file train.jsonl --source_column document --target_column summary --gradient_checkpointing \
        --optim adafactor --per_device_train_batch_size 4 --gradient_accumulation_steps 4

`--peft_method layers` trains the last quarter of the blocks, `--peft_method parameter_types` only the attention. All
other methods work here too. `--help` lists every option and `--config FILE` reads them from YAML.
"""

from left_trainer import fine_tune, format_report, get_task, run_program, set_up, training_parser, user_errors


def main() -> None:
    with user_errors():  # bad input ends the program with one paragraph
        parser = training_parser(
            output_dir="outputs/full_finetuning",
            peft_method="full",
            # Training every parameter soon overfits a small dataset: with --num_train_epochs 5, the epoch with the
            # lowest validation loss is kept. A checkpoint includes Adam's moments, so it is three times the model on
            # disk.
            save_strategy="epoch",
            load_best_model_at_end=True,
            save_total_limit=1,
        )
        model_args, data_args, args = parser.parse_args_and_config()
        run = set_up(get_task("summarization"), model_args, data_args, args)
    report = fine_tune(run)
    if run.trainer.is_world_process_zero():
        print(format_report(report, args.output_dir))


if __name__ == "__main__":
    raise SystemExit(run_program(main))
