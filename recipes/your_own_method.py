"""Define a fine-tuning method in this file and train with it: LoRA in the cross-attention alone.

    accelerate launch recipes/your_own_method.py

Gheini et al. (2021) adapt a translation model to a new language by training nothing but its cross-attention, and lose
little against training all of it. The record below does so with low-rank updates: encoder and self-attention, which
several tasks can share, stay as they were. One record is all it takes: from then on the trainer, the callbacks, the
model card and the checks of `--peft_kwargs` know the method. See docs/adding_a_method.md for what else it can hold.

    accelerate launch recipes/your_own_method.py --peft_kwargs r=16 --model_name_or_path google/flan-t5-small \
        --train_file train.jsonl --source_column document --target_column summary

Merge afterwards, as any LoRA; the script that registers the method is not needed for it:

    left-trainer merge --adapter outputs/your_own_method --output_dir outputs/cross_attention_merged

`--peft_method` compares it with any other method. `--help` lists every option, `--config FILE` reads them from YAML.
"""

from peft import LoraConfig

from left_trainer import PeftMethod, get_task, register_method
from left_trainer.runs.build_report import format_report
from left_trainer.runs.fine_tuning import fine_tune, set_up, training_parser

register_method(
    PeftMethod(
        name="cross_attention_lora",
        family="reparameterization",
        summary="low-rank updates in the cross-attention between encoder and decoder",
        paper="after Gheini et al., 2021, arXiv 2104.08771",
        config_class=LoraConfig,
        # Used when the user sets none, and the report says from where it is.
        learning_rate=2e-4,
        learning_rate_source="that of lora",
        # A regular expression over full module names: T5 calls it EncDecAttention, BART and Marian encoder_attn.
        # One that matches nothing stops the run before weights are loaded.
        defaults={"r": 8, "lora_alpha": 16, "target_modules": r".*\.(EncDecAttention|encoder_attn)\.\w+"},
        # What it cannot do, with the reason that a user is told.
        unsupported={"decoder_only": "it has no cross-attention."},
        mergeable=True,
    )
)


def main() -> None:
    parser = training_parser(output_dir="outputs/your_own_method", peft_method="cross_attention_lora")
    model_args, data_args, args = parser.parse_args_and_config()
    run = set_up(get_task("summarization"), model_args, data_args, args)
    report = fine_tune(run)
    if run.trainer.is_world_process_zero():
        print(format_report(report, args.output_dir))


if __name__ == "__main__":
    main()
