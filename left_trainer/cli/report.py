"""`left-trainer report`: merge the folders of several comparisons into one table and page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from left_trainer.argument_parser import ArgumentParser
from left_trainer.cli.compare_work import add_table_option
from left_trainer.cli.errors import user_errors
from left_trainer.imports import import_stack
from left_trainer.plugins import add_plugin_option
from left_trainer.secret_values import shown_command

DESCRIPTION = """Merge output folders of `left-trainer compare`, from one or several machines, into one table and one
page. Runs that differ only in the seed become one row, with mean and 95 % interval. A folder on which `left-trainer
compare --work` processes still work can be read too.

Different models, or different data for one task, are refused unless you pass --allow_mixed.
"""
EXAMPLES = """examples:
  left-trainer report outputs/compare                                  write tables, plots and page again
  left-trainer report machine1/compare machine2/compare --output_dir outputs/both
"""


def main(argv: list[str]) -> int:
    """Read and check the results, write the output files."""
    parser = ArgumentParser(
        prog="left-trainer report",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output folder of a comparison")
    parser.add_argument(
        "--output_dir", metavar="DIR", help="folder for the output (default for a single DIR: that folder)"
    )
    parser.add_argument("--allow_mixed", action="store_true", help="allow different models and data in one table")
    parser.add_argument("--title", default="", metavar="TEXT", help="title of the tables and the page")
    add_plugin_option(parser)
    add_table_option(parser)
    options = parser.parse_args(argv)

    import_stack()
    from left_trainer.comparison.gathered import gather
    from left_trainer.comparison.output import copy_predictions, write_outputs
    from left_trainer.comparison.results import are_shown, check_comparable, merge
    from left_trainer.comparison.table_log import check_trackers, log_table
    from left_trainer.comparison.tables import terminal
    from left_trainer.storage.locks import folder_lock
    from left_trainer.storage.whole import sweep

    with user_errors():
        check_trackers(options.log_table or ())
        folders = [Path(folder) for folder in options.folders]
        if options.output_dir is None and len(folders) > 1:
            raise ValueError("Several folders are merged into a new folder. Pass it with --output_dir DIR.")
        output_dir = Path(options.output_dir or folders[0])
        if output_dir not in folders and (output_dir / "results.jsonl").exists():
            raise FileExistsError(
                f"output_dir={str(output_dir)!r} contains results but is not one of the folders to merge. Add it to "
                "the folders, or choose another --output_dir."
            )
        gathered = {folder: gather(folder) for folder in folders}
        results = merge(folders, lambda folder: gathered[folder].results)
        if not are_shown(results):
            raise ValueError(f"{', '.join(map(str, folders))}: no run is finished yet. Wait until one is.")
        if not options.allow_mixed:
            check_comparable(result.cell for result in results)
    for folder, found in gathered.items():
        if found.n_left:
            print(f"{folder}: {found.n_left} runs are not finished, and are not in the table.", file=sys.stderr)
    command = shown_command(["left-trainer", "report", *argv])
    with folder_lock(output_dir):
        sweep(output_dir)
        copy_predictions(folders, results, output_dir)
        summary = write_outputs(results, output_dir, options.title, command)
    log_table(options.log_table or (), summary, output_dir)
    print(terminal(summary, output_dir))
    return 0
