"""`left-trainer merge`: merge an adapter into its base model, or several adapters into one."""

from __future__ import annotations

import argparse
from pathlib import Path

from left_trainer.argument_parser import ArgumentParser
from left_trainer.cli.errors import user_errors
from left_trainer.cli.options import add_loading_options, add_row_options, check_adapter, hub_options, positive
from left_trainer.imports import import_stack

DESCRIPTION = """Merge an adapter into the weights of its base model and save the whole model with its tokenizer and the
settings that it was scored with. The merged model does not need PEFT: it loads with AutoModel....from_pretrained and is
as fast as the base model. Its logits are compared with those of the adapter first: if they differ, nothing is written.

With --adapters, combine several LoRA adapters of one base model into one, by PEFT's add_weighted_adapter. With
--test_file, each of them and the combination are scored.
"""
EXAMPLES = """examples:
  left-trainer merge --adapter outputs/lora --output_dir outputs/merged
  left-trainer merge --adapters outputs/a outputs/b --combine ties --weights 1 0.5 --output_dir outputs/both \\
      --test_file test.jsonl
"""
FOR_SEVERAL = ("combine", "weights", "density", "test_file", "task", "source_column", "target_column")


def main(argv: list[str]) -> int:
    """Load, merge, save."""
    options = _parser().parse_args(argv)
    with user_errors():
        output = Path(options.output_dir)
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise FileExistsError(f"--output_dir {str(output)!r} exists and is not empty. Choose a new folder.")
        for path in options.adapters or []:
            if not Path(path).is_dir():
                raise FileNotFoundError(f"--adapters {path!r} does not exist. Pass the output_dir of a training run.")
        import_stack()
        if options.adapter is not None:
            check_adapter(options.adapter)
        from left_trainer.trainer.run_checks import check_writable

        check_writable(output)
        if options.adapters:
            return _combine(options, output)
        given = [name for name in FOR_SEVERAL if getattr(options, name) is not None]
        if given:
            raise ValueError(f"--{given[0]} is for --adapters, which combines several. Remove it.")
        from left_trainer.runs.merging import merge_adapter

        dtype = merge_adapter(options.adapter, output, options.trust_remote_code, options.dtype, hub_options(options))
    print(f"The merged model, in {str(dtype).removeprefix('torch.')}, is in {output}")
    return 0


def _combine(options: argparse.Namespace, output: Path) -> int:
    from transformers.utils.logging import disable_progress_bar

    from left_trainer.callbacks.tables import format_table
    from left_trainer.data.arguments import DataArguments
    from left_trainer.export.combining import Combination, combine_adapters

    if options.combine is None:
        raise ValueError("--adapters needs --combine: linear, cat, ties or dare_ties.")
    disable_progress_bar()
    data = None
    if options.test_file:
        data = DataArguments(
            test_file=options.test_file,
            source_column=options.source_column,
            target_column=options.target_column,
            max_eval_samples=options.max_eval_samples,
        )
    asked = Combination(
        tuple(options.adapters),
        options.combine,
        tuple(options.weights) if options.weights else None,
        options.density,
        data,
        options.task,
        options.trust_remote_code,
        options.dtype,
    )
    scores = combine_adapters(asked, output)
    if scores:
        names = [name for name in next(iter(scores.values())) if not name.endswith(("_second", "runtime", "_time"))]
        cells = [[path, *(_shown(each.get(name)) for name in names)] for path, each in scores.items()]
        print(format_table("Scores on the test rows", ["adapter", *names], cells))
    print(f"The combination is in {output}")
    return 0


def _shown(score: float | None) -> str:
    return "-" if score is None else f"{score:.4g}"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="left-trainer merge",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--adapter", metavar="DIR", help="output folder of a run, or its name on the Hub")
    which.add_argument("--adapters", nargs="+", metavar="DIR", help="output folders of runs on one base model")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="new folder for the merged model or adapter")
    parser.add_argument("--combine", metavar="HOW", help="for --adapters: linear, cat, ties or dare_ties")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one for each (default: equal, sum 1)")
    parser.add_argument("--density", type=float, metavar="D", help="share that ties and dare_ties keep (default: 0.5)")
    add_row_options(
        parser,
        "rows to score each adapter and the combination on",
        "task whose metrics are computed (default: that of the first run)",
    )
    parser.add_argument("--max_eval_samples", type=positive, metavar="N", help="score only the first N rows")
    add_loading_options(parser)
    return parser
