"""Fine-tune a language model to summarize, with LoRA or any other method.

On the embedded model and data, without network access:

    accelerate launch recipes/lora_summarization.py

On your own model and data:

    accelerate launch recipes/lora_summarization.py --model_name_or_path google/flan-t5-small \
        --train_file train.jsonl --validation_file validation.jsonl --source_column document --target_column summary

To use another method, set `--peft_method ia3`; to use a decoder-only model, pass its path. `--help` lists every option
and `--config FILE` reads them from YAML. Results are written to `--output_dir`. This recipe contains the steps that the
others leave to `set_up` and `fine_tune`: copy it to change the steps, or copy another to change task and method.

The adapter can be merged into the base weights. The merged model is as fast as the base model:

    left-trainer merge --adapter outputs/lora_summarization --output_dir outputs/lora_merged
"""

from left_trainer import (
    LeftTrainer,
    MemoryProfilerCallback,
    StepTimerCallback,
    TrainableParametersCallback,
    build_report,
    collect_samples,
    format_report,
    get_task,
    load_tokenizer,
    prepare_task_data,
    run_program,
    score,
    text_metrics,
    training_parser,
    user_errors,
    with_task_settings,
    write_report,
)


def main() -> None:
    with user_errors():  # bad input ends the program with one paragraph
        # Model, data, and every field of Seq2SeqTrainingArguments and SFTConfig. Defaults: one epoch, batches of 16,
        # scores from generated text. Flags and --config override the values given here.
        parser = training_parser(output_dir="outputs/lora_summarization", peft_method="lora")
        model_args, data_args, args = parser.parse_args_and_config()

        # The task converts rows to prompts, and sets how to generate and which metrics to compute.
        task = get_task("summarization")
        args = with_task_settings(task, args)
        source = model_args.source(args)
        tokenizer = load_tokenizer(source)
        data = prepare_task_data(task, data_args, source, tokenizer, args)

        # args.peft_method selects what is trained. Everything else is as in Hugging Face's trainers.
        trainer = LeftTrainer(
            source,
            args,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            processing_class=tokenizer,
            compute_metrics=text_metrics(tokenizer, task.metrics) if args.predict_with_generate else None,
            callbacks=[TrainableParametersCallback(), MemoryProfilerCallback(), StepTimerCallback()],
        )

    with trainer.without_adapter():
        before = score(trainer, data["test"])
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = score(trainer, data["test"])

    # Write the adapter, tokenizer, model card, report and plots to args.output_dir.
    trainer.save_model()
    texts = {"before": before.predictions, "after": after.predictions}
    samples = collect_samples(data["test"], trainer.processing_class, texts, number=3)
    report = build_report(trainer, task, before.metrics, after.metrics, data_args.prompt, samples)
    if trainer.is_world_process_zero():
        write_report(trainer, report)
        print(format_report(report, args.output_dir))


if __name__ == "__main__":
    raise SystemExit(run_program(main))
