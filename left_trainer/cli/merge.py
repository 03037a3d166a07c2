"""`left-trainer merge`: merge an adapter into its base model."""

from __future__ import annotations

from pathlib import Path

from left_trainer.argument_parser import ArgumentParser
from left_trainer.cli.errors import user_errors
from left_trainer.cli.options import add_loading_options, check_adapter, hub_options

DESCRIPTION = """Merge an adapter into the weights of its base model and save the whole model with its tokenizer and the
settings that it was scored with. The merged model does not need PEFT: it loads with AutoModel....from_pretrained and is
as fast as the base model. Its logits are compared with those of the adapter first: if they differ, nothing is written.
"""


def main(argv: list[str]) -> int:
    """Load, merge, save."""
    parser = ArgumentParser(prog="left-trainer merge", description=DESCRIPTION)
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="output folder of a run, or its name on the Hub"
    )
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="new folder for the merged model")
    add_loading_options(parser)
    options = parser.parse_args(argv)

    with user_errors():
        output = Path(options.output_dir)
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise FileExistsError(f"--output_dir {str(output)!r} exists and is not empty. Choose a new folder.")
        check_adapter(options.adapter)
        from left_trainer.runs.merging import merge_adapter
        from left_trainer.trainer.run_checks import check_writable

        check_writable(output)
        dtype = merge_adapter(options.adapter, output, options.trust_remote_code, options.dtype, hub_options(options))
    print(f"The merged model, in {str(dtype).removeprefix('torch.')}, is in {output}")
    return 0
