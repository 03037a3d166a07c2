"""Fine-tune a language model to translate with prefix tuning: learned keys and values in every layer of the decoder.

    accelerate launch recipes/prefix_tuning_translation.py

20 positions that no token stands on are put before the sequence, and every layer of the decoder attends to keys and
values that are learned for them. They take no part in the input, so unlike prompt tuning they act on every layer
directly; the base model stays untouched. On your own, any pair of languages that the model has seen:

    accelerate launch recipes/prefix_tuning_translation.py --model_name_or_path google/mt5-small \
        --train_file train.jsonl --source_column en --target_column fr --prompt 'Translate to French: {source}'

Longer prefixes are stronger and slow every generated token a little: `--peft_kwargs num_virtual_tokens=50`. In a model
with an encoder, `--peft_method p_tuning_v2` puts prefixes there and in the cross-attention too, and goes together with
`--gradient_checkpointing`, which prefix tuning does not. Any other method is the same one flag. `--help` lists every
option and `--config FILE` reads them from YAML.
"""

from left_trainer import get_task
from left_trainer.runs.build_report import format_report
from left_trainer.runs.fine_tuning import fine_tune, set_up, training_parser


def main() -> None:
    parser = training_parser(
        output_dir="outputs/prefix_tuning_translation",
        # The learning rate is 50 times LoRA's, as prefixes start at random and have far to go.
        peft_method="prefix_tuning",
        # Translations are usually judged from beam search; 1 is greedy, and several times as fast.
        generation_num_beams=4,
    )
    model_args, data_args, args = parser.parse_args_and_config()
    run = set_up(get_task("translation"), model_args, data_args, args)
    report = fine_tune(run)
    if run.trainer.is_world_process_zero():
        print(format_report(report, args.output_dir))


if __name__ == "__main__":
    main()
