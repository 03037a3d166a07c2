"""Fine-tune a language model to summarize with IA3, which learns only scaling factors.

    accelerate launch recipes/ia3_summarization.py

IA3 multiplies the keys, the values and the feed-forward activations of every layer by one learned vector each. It has
about a tenth of LoRA's parameters, and is a good choice for a few hundred rows. On your own model and data:

    accelerate launch recipes/ia3_summarization.py --model_name_or_path google/flan-t5-small \
        --train_file train.jsonl --source_column document --target_column summary

The factors can be merged into the base weights. The merged model needs no PEFT and is as fast as the base model:

    left-trainer merge --adapter outputs/ia3_summarization --output_dir outputs/ia3_merged

To use any other method, set `--peft_method`. `--help` lists every option and `--config FILE` reads them from YAML.
"""

from left_trainer import fine_tune, format_report, get_task, run_program, set_up, training_parser, user_errors


def main() -> None:
    with user_errors():  # bad input ends the program with one paragraph
        parser = training_parser(
            output_dir="outputs/ia3_summarization",
            peft_method="ia3",
            # There is no rank or dropout to choose. The learning rate matters most. It is 25 times LoRA's, because all
            # factors start at one and have to change a lot. As in the paper, it warms up over the first 6 percent of
            # steps. To rescale other modules: --peft_kwargs '{"target_modules": ["q", "v"], "feedforward_modules": []}'
            warmup_steps=0.06,
        )
        model_args, data_args, args = parser.parse_args_and_config()
        run = set_up(get_task("summarization"), model_args, data_args, args)
    report = fine_tune(run)
    if run.trainer.is_world_process_zero():
        print(format_report(report, args.output_dir))


if __name__ == "__main__":
    raise SystemExit(run_program(main))
