"""Fine-tune a multilingual model with the tokens of your data alone.

    accelerate launch recipes/trim_vocabulary.py

mT5-small has 300 million parameters, and 256 million of them are rows for 250,112 tokens of a hundred languages. Data
in one language use some ten thousand of these. `shrink_to="vocabulary=data"` takes the others out of the model and of
its tokenizer before the training starts. The weights are smaller, and so is the largest product of a step, the one at
the output head. On your own data:

    accelerate launch recipes/trim_vocabulary.py --model_name_or_path google/mt5-small --train_file train.jsonl \
        --source_column document --target_column summary --peft_method lora --learning_rate 1e-3

What stays: every token that the rows of training and validation are cut into, special tokens, languages and sentinels,
and single characters. So the data are cut into the same tokens as before, other texts are still read and written whole,
though in more tokens, and what the model computes from its tokens is what it was. What is saved is smaller too: the
whole model, or with an adapter the trimmed base in `base/`, beside the adapter that fits it, and the trimmed tokenizer.
`left-trainer generate`, `evaluate` and `merge` find both.

To trim a model without training it, call `trim_vocabulary(model, tokenizer, texts)` and save both.
"""

from left_trainer import fine_tune, format_report, get_task, run_program, set_up, training_parser, user_errors


def main() -> None:
    with user_errors():  # bad input ends the program with one paragraph
        parser = training_parser(output_dir="outputs/trim_vocabulary", peft_method="lora", shrink_to="vocabulary=data")
        model_args, data_args, args = parser.parse_args_and_config()
        run = set_up(get_task("summarization"), model_args, data_args, args)  # says how many tokens are left
    report = fine_tune(run)
    if run.trainer.is_world_process_zero():
        print(format_report(report, args.output_dir))
        print(f"{run.trainer.vocabulary}.")


if __name__ == "__main__":
    raise SystemExit(run_program(main))
