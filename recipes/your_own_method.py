"""Define your own fine-tuning method and train with it: LoRA in the cross-attention only.

    accelerate launch recipes/your_own_method.py

Gheini et al. (2021) adapt a translation model to a new language by training only its cross-attention, and lose little
compared with training the whole model. The record below does this with low-rank updates. Encoder and self-attention,
which several tasks can share, stay unchanged. After the record is registered, the trainer, the callbacks, the model
card and the checks of `--peft_kwargs` support the method. See docs/adding_a_method.md for all fields of a record.

    accelerate launch recipes/your_own_method.py --peft_kwargs r=16 --model_name_or_path google/flan-t5-small \
        --train_file train.jsonl --source_column document --target_column summary

Merge the adapter like any LoRA adapter; this does not need the script that registers the method:

    left-trainer merge --adapter outputs/your_own_method --output_dir outputs/cross_attention_merged

To compare with another method, set `--peft_method`. `--help` lists every option, `--config FILE` reads them from YAML.
"""

from peft import LoraConfig

from left_trainer import (
    PeftMethod,
    fine_tune,
    format_report,
    get_task,
    register_method,
    run_program,
    set_up,
    training_parser,
    user_errors,
)

register_method(
    PeftMethod(
        name="cross_attention_lora",
        family="reparameterization",
        summary="low-rank updates in the cross-attention between encoder and decoder",
        paper="after Gheini et al., 2021, arXiv 2104.08771",
        config_class=LoraConfig,
        # Used if the user sets none; the report names the source.
        learning_rate=2e-4,
        learning_rate_source="same as lora",
        # A regular expression over full module names: T5 calls it EncDecAttention, BART and Marian encoder_attn.
        # If it matches nothing, the run stops before weights are loaded.
        defaults={"r": 8, "lora_alpha": 16, "target_modules": r".*\.(EncDecAttention|encoder_attn)\.\w+"},
        # What the method does not support, with the reason shown to the user.
        unsupported={"decoder_only": "it has no cross-attention."},
        mergeable=True,
    )
)


def main() -> None:
    with user_errors():  # bad input ends the program with one paragraph
        parser = training_parser(output_dir="outputs/your_own_method", peft_method="cross_attention_lora")
        model_args, data_args, args = parser.parse_args_and_config()
        run = set_up(get_task("summarization"), model_args, data_args, args)
    report = fine_tune(run)
    if run.trainer.is_world_process_zero():
        print(format_report(report, args.output_dir))


if __name__ == "__main__":
    raise SystemExit(run_program(main))
