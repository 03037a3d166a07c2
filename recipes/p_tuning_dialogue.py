"""Fine-tune a language model on dialogue with P-tuning: virtual tokens computed by a small network.

    accelerate launch recipes/p_tuning_dialogue.py

Every prompt is preceded by 20 virtual tokens. During training, a small MLP computes them from 20 trained embeddings.
This connects the tokens and makes them converge faster than the independent embeddings of prompt tuning. After
training, only the output of the MLP is needed, an adapter of a few kilobytes; `adapter_training_state.safetensors` is
only needed to continue training. On your own model and data:

    accelerate launch recipes/p_tuning_dialogue.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --train_file train.jsonl --source_column dialogue --target_column response

Options set the number of virtual tokens, the width of the network, and an LSTM before the MLP as in the paper:

    --peft_kwargs num_virtual_tokens=40,encoder_hidden_size=256
    --peft_kwargs encoder_reparameterization_type=LSTM

To use any other method, set `--peft_method`. `--help` lists every option and `--config FILE` reads them from YAML.
"""

from left_trainer import fine_tune, format_report, get_task, run_program, set_up, training_parser, user_errors


def main() -> None:
    with user_errors():  # bad input ends the program with one paragraph
        parser = training_parser(
            output_dir="outputs/p_tuning_dialogue",
            peft_method="p_tuning",
            # The virtual tokens are initialized randomly and have to change a lot, so the learning rate is 50 times
            # LoRA's. It warms up over the first tenth of the steps, because random tokens disturb the model most.
            warmup_steps=0.1,
        )
        model_args, data_args, args = parser.parse_args_and_config()
        run = set_up(get_task("dialogue"), model_args, data_args, args)
    report = fine_tune(run)
    if run.trainer.is_world_process_zero():
        print(format_report(report, args.output_dir))


if __name__ == "__main__":
    raise SystemExit(run_program(main))
