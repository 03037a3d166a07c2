"""Fine-tune a language model to classify texts with prompt tuning: only 20 virtual tokens are trained.

    accelerate launch recipes/prompt_tuning_classification.py

The model generates the label as a word, so a new set of labels needs no new head. One frozen model serves many tasks,
each with a few thousand parameters placed before the input. On your own model and data:

    accelerate launch recipes/prompt_tuning_classification.py --model_name_or_path google/flan-t5-large \
        --train_file reviews.csv --source_column text --target_column label \
        --prompt 'Is this review positive or negative? {source} Answer:'

On large models, it comes close to full fine-tuning; on small ones, `--peft_method p_tuning` or `lora` works better.
With few rows, initialize the virtual tokens from words instead of randomly:

    --peft_kwargs '{"num_virtual_tokens": 8, "prompt_tuning_init": "TEXT", "tokenizer_name_or_path":
        "google/flan-t5-large", "prompt_tuning_init_text": "Say whether the review is positive."}'

`--help` lists every option and `--config FILE` reads them from YAML.
"""

from left_trainer import fine_tune, format_report, get_task, run_program, set_up, training_parser, user_errors


def main() -> None:
    with user_errors():  # bad input ends the program with one paragraph
        parser = training_parser(
            output_dir="outputs/prompt_tuning_classification",
            # The learning rate is 3e-2, 150 times LoRA's: a few randomly initialized embeddings have to move by
            # distances as large as those between words. It stays constant, as in Lester et al. (2021), because they
            # converge slowly: after one epoch the embedded model is right for 67 reviews of 100, after three for all.
            peft_method="prompt_tuning",
            lr_scheduler_type="constant",
            num_train_epochs=3,
        )
        model_args, data_args, args = parser.parse_args_and_config()
        run = set_up(get_task("classification"), model_args, data_args, args)
    report = fine_tune(run)
    if run.trainer.is_world_process_zero():
        print(format_report(report, args.output_dir))


if __name__ == "__main__":
    raise SystemExit(run_program(main))
