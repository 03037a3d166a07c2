"""Train every parameter of a language model to summarize: what the other recipes are compared with.

    accelerate launch recipes/full_finetuning.py

Against the recipes with adapters, three things differ:

- Memory. Gradients and Adam's two moments add 12 bytes for each float32 parameter, where an adapter adds them for a few
  percent. A model of 1 billion parameters needs 16 GB before the first activation.
- The learning rate, 5e-5 and so a quarter of LoRA's: pretrained weights are moved, not new ones beside them.
- What is saved: the whole model. It loads with `AutoModelForSeq2SeqLM.from_pretrained("outputs/full_finetuning")`,
  needs no PEFT and has nothing to merge, but every task takes the disk space of a model.

On your own, with less memory: activations recomputed, Adafactor's small optimizer state, small batches accumulated.

    accelerate launch recipes/full_finetuning.py --model_name_or_path google/flan-t5-small \
        --train_file train.jsonl --source_column document --target_column summary --gradient_checkpointing \
        --optim adafactor --per_device_train_batch_size 4 --gradient_accumulation_steps 4

`--peft_method layers` trains the last quarter of the blocks, `--peft_method parameter_types` the attention alone; these
and all other methods work here too. `--help` lists every option and `--config FILE` reads them from YAML.
"""

from left_trainer import get_task
from left_trainer.runs.build_report import format_report
from left_trainer.runs.fine_tuning import fine_tune, set_up, training_parser


def main() -> None:
    parser = training_parser(
        output_dir="outputs/full_finetuning",
        peft_method="full",
        # With every parameter free to move, few rows are soon learned by heart: --num_train_epochs 5 keeps the epoch
        # with the lowest validation loss. A checkpoint holds Adam's moments too, three times the model on disk.
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
    main()
