"""Fine-tune a language model to summarize, with LoRA or any other method.

On the embedded model and data, without a network:

    accelerate launch recipes/lora_summarization.py

On your own:

    accelerate launch recipes/lora_summarization.py --model_name_or_path google/flan-t5-small \
        --train_file train.jsonl --validation_file validation.jsonl --source_column document --target_column summary

Another method is one flag, `--peft_method ia3`, and a decoder-only model one path. `--help` lists every option;
`--config FILE` reads them from YAML. Results go to `--output_dir`. This recipe spells out what the others leave to
`left_trainer.runs.fine_tuning`: copy it to change how a run goes, and one of those to change what it is about.

The adapter folds into the base weights, so that serving costs what the base model costs:

    left-trainer merge --adapter outputs/lora_summarization --output_dir outputs/lora_merged
"""

from left_trainer import (
    LeftTrainer,
    MemoryProfilerCallback,
    StepTimerCallback,
    TrainableParametersCallback,
    get_task,
    load_tokenizer,
    prepare_task_data,
    text_metrics,
)
from left_trainer.runs.build_report import build_report, collect_samples, format_report, write_report
from left_trainer.runs.fine_tuning import training_parser, with_task_settings


def main() -> None:
    # Which model, which data, and everything that Seq2SeqTrainingArguments and SFTConfig take. Where nothing else is
    # said: one epoch, batches of 16, scores from generated text. Flags and --config beat what stands here.
    parser = training_parser(output_dir="outputs/lora_summarization", peft_method="lora")
    model_args, data_args, args = parser.parse_args_and_config()

    # What for: the task turns rows into prompts, says how to generate, and which metrics judge the result.
    task = get_task("summarization")
    args = with_task_settings(task, args)
    source = model_args.source(args)
    tokenizer = load_tokenizer(source)
    data = prepare_task_data(task, data_args, source, tokenizer, args)

    # What is trained: args.peft_method. Everything else is as in Hugging Face's trainers.
    trainer = LeftTrainer(
        source,
        args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        compute_metrics=text_metrics(tokenizer, task.metrics),
        callbacks=[TrainableParametersCallback(), MemoryProfilerCallback(), StepTimerCallback()],
    )
    with trainer.without_adapter():
        before = trainer.predict(data["test"], metric_key_prefix="test")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = trainer.predict(data["test"], metric_key_prefix="test")

    # What it gave: adapter, tokenizer, model card, report and plots in args.output_dir.
    trainer.save_model()
    texts = {"before": before.predictions, "after": after.predictions}
    samples = collect_samples(data["test"], tokenizer, texts, number=3)
    report = build_report(trainer, task, before.metrics, after.metrics, data_args.prompt, samples)
    if trainer.is_world_process_zero():
        write_report(trainer, report)
        print(format_report(report, args.output_dir))


if __name__ == "__main__":
    main()
