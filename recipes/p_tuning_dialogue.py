"""Fine-tune a language model on dialogue with P-tuning: virtual tokens that a small network computes.

    accelerate launch recipes/p_tuning_dialogue.py

Every prompt is preceded by 20 virtual tokens. In training a small MLP computes them from 20 trained embeddings, which
ties them together and makes them converge faster than the free embeddings of prompt tuning. Afterwards only its output
is needed, an adapter of a few kilobytes; `adapter_training_state.safetensors` beside it only serves to train further.
On your own:

    accelerate launch recipes/p_tuning_dialogue.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --train_file train.jsonl --source_column dialogue --target_column response

Its options: how many virtual tokens, how wide the network, and an LSTM in front of the MLP as in the paper.

    --peft_kwargs num_virtual_tokens=40,encoder_hidden_size=256
    --peft_kwargs encoder_reparameterization_type=LSTM

Any other method is one flag, `--peft_method`; `--help` lists every option and `--config FILE` reads them from YAML.
"""

from left_trainer import get_task
from left_trainer.runs.build_report import format_report
from left_trainer.runs.fine_tuning import fine_tune, set_up, training_parser


def main() -> None:
    parser = training_parser(
        output_dir="outputs/p_tuning_dialogue",
        peft_method="p_tuning",
        # The virtual tokens start at random and have far to go, so the learning rate is 50 times LoRA's; it rises over
        # the first tenth of the steps, because they disturb the model most while they are still random.
        warmup_steps=0.1,
    )
    model_args, data_args, args = parser.parse_args_and_config()
    run = set_up(get_task("dialogue"), model_args, data_args, args)
    report = fine_tune(run)
    if run.trainer.is_world_process_zero():
        print(format_report(report, args.output_dir))


if __name__ == "__main__":
    main()
