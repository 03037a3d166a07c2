"""Fine-tune a language model to translate with bottleneck adapters: small networks inside every layer.

    accelerate launch recipes/bottleneck_adapter_translation.py

Each adapter projects the hidden state down to a few units, applies a nonlinearity, projects back up and adds the
result. Choose one of three kinds:

    --peft_method houlsby_adapter    # the default: after attention and feed-forward; most capacity, slowest generation
    --peft_method pfeiffer_adapter   # after the feed-forward only: less than half the parameters, less delay
    --peft_method parallel_adapter   # parallel to the feed-forward; for generation, with more units

The bottleneck is a sixteenth of the hidden size. With a large dataset, make it wider, as the authors of the parallel
adapter did for translation: `--peft_kwargs reduction_factor=2`. Adapters are not linear, so they cannot be merged into
the weights; if generation speed matters most, use `--peft_method lora`. On your own model and data:

    accelerate launch recipes/bottleneck_adapter_translation.py --model_name_or_path google/mt5-small \
        --train_file train.jsonl --source_column en --target_column fr --prompt 'Translate to French: {source}'

To use any other method, set `--peft_method`. `--help` lists every option and `--config FILE` reads them from YAML.
"""

from left_trainer import fine_tune, format_report, get_task, run_program, set_up, training_parser, user_errors


def main() -> None:
    with user_errors():  # bad input ends the program with one paragraph
        parser = training_parser(
            output_dir="outputs/bottleneck_adapter_translation",
            # The adapters start close to the identity, so the first step sees the pretrained model. The learning rate
            # is 5 times LoRA's.
            peft_method="houlsby_adapter",
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
