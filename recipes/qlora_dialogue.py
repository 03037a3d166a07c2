"""Fine-tune a language model on dialogue with QLoRA: LoRA on a base model in 4 bits.

    pip install 'left_trainer[quantization]'   # bitsandbytes; without it the run stops with an error
    accelerate launch recipes/qlora_dialogue.py

Each weight in the linear layers of the base takes half a byte (NF4), plus a little for the scales. For 7 billion
parameters, that is about 4 GiB, compared with 13 in bfloat16 and 26 in float32. Only the adapter has gradients and
Adam moments. It saves memory but takes more time, because the weights are unpacked at each use. On a GPU, on your data:

    accelerate launch recipes/qlora_dialogue.py --model_name_or_path Qwen/Qwen2.5-7B-Instruct --dtype bfloat16 --bf16 \
        --gradient_checkpointing --per_device_train_batch_size 4 --gradient_accumulation_steps 4 \
        --train_file train.jsonl --source_column dialogue --target_column response

It also runs on a CPU, but slower than LoRA, and the embedded model is too small to save much memory. To use any other
method, set `--peft_method`; `--peft_method loftq` initializes the adapter from the quantization error.
`--help` lists every option and `--config FILE` reads them from YAML.
"""

from left_trainer import fine_tune, format_report, get_task, run_program, set_up, training_parser, user_errors


def main() -> None:
    with user_errors():  # bad input ends the program with one paragraph
        parser = training_parser(
            output_dir="outputs/qlora_dialogue",
            # Low-rank updates on every linear layer compensate for the quantization better than on query and value
            # only. The base is quantized while it loads, so a 4-bit checkpoint is not needed.
            peft_method="qlora",
            # The paper's schedule: a short warmup, then a constant rate, with clipping of rare large gradients.
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=0.03,
            max_grad_norm=0.3,
        )
        model_args, data_args, args = parser.parse_args_and_config()
        run = set_up(get_task("dialogue"), model_args, data_args, args)
    report = fine_tune(run)
    if run.trainer.is_world_process_zero():
        print(format_report(report, args.output_dir))


if __name__ == "__main__":
    raise SystemExit(run_program(main))
