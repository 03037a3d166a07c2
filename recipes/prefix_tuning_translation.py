"""Fine-tune a language model to translate with prefix tuning: learned keys and values in every layer of the decoder.

    accelerate launch recipes/prefix_tuning_translation.py

20 virtual positions are placed before the sequence, and every layer of the decoder attends to keys and values that are
learned for them. They are not part of the input, so unlike prompt tuning they act on every layer directly. The base
model stays unchanged. On your own model and data, with any pair of languages that the model has seen:

    accelerate launch recipes/prefix_tuning_translation.py --model_name_or_path google/mt5-small \
        --train_file train.jsonl --source_column en --target_column fr --prompt 'Translate to French: {source}'

Longer prefixes have more capacity but make generation slightly slower: `--peft_kwargs num_virtual_tokens=50`. In a
model with an encoder, `--peft_method p_tuning_v2` also adds prefixes to the encoder and the cross-attention. It works
with `--gradient_checkpointing`, which prefix tuning does not. To use any other method, set `--peft_method`. `--help`
lists every option and `--config FILE` reads them from YAML.
"""

from left_trainer import fine_tune, format_report, get_task, run_program, set_up, training_parser, user_errors


def main() -> None:
    with user_errors():  # bad input ends the program with one paragraph
        parser = training_parser(
            output_dir="outputs/prefix_tuning_translation",
            # The learning rate is 50 times LoRA's, because prefixes are initialized randomly and have to change a lot.
            peft_method="prefix_tuning",
            # Translation is usually evaluated with beam search; 1 is greedy, and several times as fast.
            generation_num_beams=4,
        )
        model_args, data_args, args = parser.parse_args_and_config()
        run = set_up(get_task("translation"), model_args, data_args, args)
    report = fine_tune(run)
    if run.trainer.is_world_process_zero():
        print(format_report(report, args.output_dir))


if __name__ == "__main__":
    raise SystemExit(run_program(main))
