"""Fine-tune a language model to summarize with IA3, which learns nothing but factors.

    accelerate launch recipes/ia3_summarization.py

IA3 multiplies the keys, the values and the feed-forward activations of every layer by one learned vector each: about a
tenth of LoRA's parameters, and a good choice for a few hundred rows. On your own:

    accelerate launch recipes/ia3_summarization.py --model_name_or_path google/flan-t5-small \
        --train_file train.jsonl --source_column document --target_column summary

The factors fold into the base weights. The merged model needs no PEFT, and serving it costs what the base model costs:

    left-trainer merge --adapter outputs/ia3_summarization --output_dir outputs/ia3_merged

Any other method is one flag, `--peft_method`; `--help` lists every option and `--config FILE` reads them from YAML.
"""

from left_trainer import get_task
from left_trainer.runs.build_report import format_report
from left_trainer.runs.fine_tuning import fine_tune, set_up, training_parser


def main() -> None:
    parser = training_parser(
        output_dir="outputs/ia3_summarization",
        peft_method="ia3",
        # There is no rank and no dropout to choose. What counts is the learning rate, 25 times LoRA's, because all
        # factors start at one and have to move far; as in the paper it rises over the first 6 percent of the steps.
        # To rescale other modules: --peft_kwargs '{"target_modules": ["q", "v"], "feedforward_modules": []}'
        warmup_steps=0.06,
    )
    model_args, data_args, args = parser.parse_args_and_config()
    run = set_up(get_task("summarization"), model_args, data_args, args)
    report = fine_tune(run)
    if run.trainer.is_world_process_zero():
        print(format_report(report, args.output_dir))


if __name__ == "__main__":
    main()
