"""Shrink a translation model while it learns: blocks, feed-forward width and heads go for good.

    accelerate launch recipes/shrink_translation.py

The model loses the parts that do least on the training batches, step by step, until 60 % of its parameters are left
(embeddings and output head aside). What is saved is a plain, smaller model: `AutoModelForSeq2SeqLM.from_pretrained`
loads it without this library. On your own model and data:

    accelerate launch recipes/shrink_translation.py --model_name_or_path google/mt5-small \
        --train_file train.jsonl --source_column en --target_column fr --num_train_epochs 3

- Another size: `--shrink_to params=0.5`, or by dimension: `--shrink_to encoder_layers=8,decoder_layers=2,ffn=0.5`. Few
  layers of the decoder make generation fast.
- In one shot, before the first step: `--shrink_kwargs schedule=at_start`.
- Until the quality falls: `--shrink_to params=0.3 --shrink_kwargs '{"keep": "chrf>=0.95"}'` returns to the last size
  with 95 % of the score. `{"keep_sizes": true}` leaves a model of each size, and a picture of all scores.
- A model that does the task already learns from itself as it was: `--teacher_model self`.
- With an adapter, `--peft_method lora`, the base shrinks too; it is saved beside the adapter, in the folder `base`.

`--help` lists every option and `--config FILE` reads them from YAML.
"""

from left_trainer import fine_tune, format_report, get_task, run_program, set_up, training_parser, user_errors


def main() -> None:
    with user_errors():  # bad input ends the program with one paragraph
        parser = training_parser(
            output_dir="outputs/shrink_translation",
            peft_method="full",
            shrink_to="params=0.6",
            # Much goes at first, while there is much to spare; after 70 % of the steps the model has its last size.
            shrink_kwargs={"schedule": "cubic", "end": 0.3},
        )
        model_args, data_args, args = parser.parse_args_and_config()
        run = set_up(get_task("translation"), model_args, data_args, args)
    report = fine_tune(run)
    if run.trainer.is_world_process_zero():
        print(format_report(report, args.output_dir))


if __name__ == "__main__":
    raise SystemExit(run_program(main))
