"""Teach a small model to summarize with a larger one, its teacher.

    accelerate launch recipes/distill_summarization.py

The student sees the data, and beside each target what the teacher holds likely in its place. That says more than the
target alone, so that the student needs fewer rows. On the embedded model, which is its own teacher here, this keeps an
adapter from forgetting what the model can do. On your own models and data:

    accelerate launch recipes/distill_summarization.py --model_name_or_path google/flan-t5-small \
        --teacher_model google/flan-t5-large --peft_method full --learning_rate 3e-4 \
        --train_file train.jsonl --source_column document --target_column summary

What the teacher says of the training rows is the same in each epoch. Kept on disk, it costs one pass over the data, and
the teacher's memory is free during the training:

    --distillation_kwargs '{"alpha": 0.5, "temperature": 2, "cache_teacher": 16}'

A teacher with other tokens, or of the other family, writes the targets instead, once; `num_beams` is its beam search:

    --teacher_model facebook/bart-large-cnn --distillation_kwargs '{"sequence_level": true, "num_beams": 4}'

A student that only ever sees texts of others meets its own mistakes for the first time when it is used. In some steps
it may write the texts itself, and the teacher says what it thinks of them:

    --distillation_kwargs '{"alpha": 0.5, "on_policy_fraction": 0.3}'

The report has the teacher's scores on the test rows beside the student's.
"""

from left_trainer import fine_tune, format_report, get_task, run_program, set_up, training_parser, user_errors


def main() -> None:
    with user_errors():  # bad input ends the program with one paragraph
        parser = training_parser(
            output_dir="outputs/distill_summarization",
            peft_method="lora",
            # The model without its adapter, which takes no further memory. Any name or path in its place is loaded.
            teacher_model="base",
            # alpha: 0 is training without a teacher, 1 the teacher alone. A temperature above 1 brings out what the
            # teacher holds second and third best.
            distillation_kwargs={"alpha": 0.25, "temperature": 2.0},
        )
        model_args, data_args, args = parser.parse_args_and_config()
        run = set_up(get_task("summarization"), model_args, data_args, args)
    report = fine_tune(run)
    if run.trainer.is_world_process_zero():
        print(format_report(report, args.output_dir))


if __name__ == "__main__":
    raise SystemExit(run_program(main))
