"""Fine-tune a language model on dialogue with QLoRA: LoRA beside a base model in 4 bits.

    pip install 'left_trainer[quantization]'   # bitsandbytes; without it the run stops and says so
    accelerate launch recipes/qlora_dialogue.py

The weights of the base's linear layers take half a byte each (NF4), and a little for their scales. For 7 billion
parameters that is about 4 GiB where bfloat16 takes 13 and float32 26, and gradients and Adam's moments exist for the
adapter alone. It trades time for memory, as each use unpacks the weights. On a GPU, on your own data:

    accelerate launch recipes/qlora_dialogue.py --model_name_or_path Qwen/Qwen2.5-7B-Instruct --dtype bfloat16 --bf16 \
        --gradient_checkpointing --per_device_train_batch_size 4 --gradient_accumulation_steps 4 \
        --train_file train.jsonl --source_column dialogue --target_column response

It runs on a CPU too, as here, but slower than LoRA and, for a model of this size, without a memory worth saving.
Any other method is one flag, `--peft_method`; `--peft_method loftq` starts the adapter from the quantization error.
`--help` lists every option and `--config FILE` reads them from YAML.
"""

from left_trainer import get_task
from left_trainer.runs.build_report import format_report
from left_trainer.runs.fine_tuning import fine_tune, set_up, training_parser


def main() -> None:
    parser = training_parser(
        output_dir="outputs/qlora_dialogue",
        # Low-rank updates on every linear layer, which makes up for the quantization better than query and value
        # alone. The base is quantized while it loads, so a 4-bit checkpoint is not needed.
        peft_method="qlora",
        # The paper's schedule: the rate rises for a few steps, then stays, and rare large gradients are cut.
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
    main()
