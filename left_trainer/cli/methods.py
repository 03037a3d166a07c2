"""`left-trainer methods`: list the fine-tuning methods, or describe one."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from left_trainer.argument_parser import ArgumentParser
from left_trainer.cli.errors import user_errors
from left_trainer.imports import import_stack
from left_trainer.plugins import add_plugin_option
from left_trainer.registry import did_you_mean

DESCRIPTION = """List the fine-tuning methods that --peft_method and LeftTrainingArguments(peft_method=...) accept.

With a NAME, show all details of that method. Parameters are counted with the method's default options, on the embedded
model or on the model given with --model; only the config of the model is read.
"""
EXAMPLES = """examples:
  left-trainer methods                                    all methods
  left-trainer methods lora                               one method: equation, options, learning rate, limits
  left-trainer methods --family soft_prompt               methods of one family
  left-trainer methods --works_with packing merge         methods that support packing and merging
  left-trainer methods --model google/flan-t5-small       methods that work on this model, with counts for it
  left-trainer methods --json | jq '.[] | select(.trainable_percent < 0.5) | .name'
"""
FAMILIES = {
    "soft_prompt": "soft prompts",
    "additive": "additive methods",
    "reparameterization": "reparameterizations",
    "selective": "selective methods",
}
# What a method can work with: its mark in the table, and its description.
WORKS_WITH = {
    "encoder_decoder": ("E", "encoder-decoder models"),
    "decoder_only": ("D", "decoder-only models"),
    "gradient_checkpointing": ("C", "gradient checkpointing"),
    "packing": ("P", "packing"),
    "quantized_base": ("4", "a base model in 4 bits"),
    "shrinking": ("S", "blocks taken out of the base"),
    "sharded": ("F", "weights spread over processes (FSDP, DeepSpeed ZeRO-3)"),
    "narrowing": ("N", "neurons and heads taken out of the layers it is on"),
    "merge": ("M", "merging into the base"),
    "lora": ("L", "writing it as a plain LoRA"),
}
# What the record of a method alone does not say: it takes the layers that the method puts on a model.
OF_THE_MODEL = ("lora",)
FALLBACK_SIZE = (120, 24)
SUMMARY_WIDTH = 30


def main(argv: list[str]) -> int:
    """Print all registered methods, or one of them."""
    parser = ArgumentParser(
        prog="left-trainer methods",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="show all details of this method")
    parser.add_argument("--family", metavar="FAMILY", help=f"show only this family: {', '.join(FAMILIES)}")
    parser.add_argument(
        "--works_with",
        nargs="+",
        default=[],
        metavar="WHAT",
        help=f"show only methods that work with all of these: {', '.join(WORKS_WITH)}",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="Hub name or path, embedded/t5 or embedded/llama: show only methods that work on it, with counts for it",
    )
    add_plugin_option(parser)
    parser.add_argument("--json", action="store_true", help="print the records as JSON")
    options = parser.parse_args(argv)

    with user_errors():
        _check_known("--family", [options.family] if options.family else [], FAMILIES)
        _check_known("--works_with", options.works_with, WORKS_WITH)
        records, left_out = _records(options)
    if options.json:
        print(json.dumps(records, indent=2, ensure_ascii=False))
    elif options.name:
        print(_description(records[0]))
    else:
        print(_table(records, left_out, options.model))
    return 0


def _check_known(argument: str, names: Sequence[str], known: Mapping[str, Any]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(
                f"{argument} {name!r} is not known.{did_you_mean(name, known)} Allowed: {', '.join(known)}."
            )


def _records(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Records of the selected methods, and names of those that do not work on the model.

    Raises `ValueError` if no method is selected.
    """
    # On import, it warns about a package that counting does not need.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    import_stack()
    from transformers.utils.logging import tqdm

    from left_trainer.cli.method_records import counting_models, default_model, record_of
    from left_trainer.methods import get_method, list_methods

    methods = [get_method(options.name)] if options.name else list_methods()
    asked = [
        method
        for method in methods
        if options.family in (None, method.family)
        and all(works_with(method, what) for what in options.works_with if what not in OF_THE_MODEL)
    ]
    if not asked:
        which = f"{options.name!r} does not match" if options.name else "No method matches"
        raise ValueError(f"{which} --family and --works_with. Remove one of them.")
    models = counting_models(options.model)
    records, left_out = [], []
    order = list(FAMILIES)
    asked.sort(key=lambda method: (order.index(method.family), method.name))
    for method in tqdm(asked, desc="Counting parameters", delay=1, leave=False, disable=None):
        model = models[options.model or default_model(method)]
        try:
            trainable = model.count(method)
        except ValueError:
            if options.name:
                raise
            left_out.append(method.name)
        else:
            record = record_of(method, trainable, model.source.width)
            if not set(options.works_with) & set(_lacks(record)):
                records.append(record)
    if not records and not left_out:
        raise ValueError(f"No method works with {' and '.join(options.works_with)}. Remove one of them.")
    return records, left_out


def works_with(method: Any, what: str) -> bool:
    """Whether `method` works with `what`, a key of `WORKS_WITH`."""
    return bool(method.mergeable if what == "merge" else method.supports(what))


def _lacks(record: Mapping[str, Any]) -> set[str]:
    """Keys of `WORKS_WITH` that a method does not work with."""
    others = {"merge": record["mergeable"], "lora": record["plain_lora"]}
    return {*record["unsupported"], *(what for what, works in others.items() if not works)}


def _marks(record: Mapping[str, Any]) -> str:
    lacks = _lacks(record)
    return "".join("·" if what in lacks else mark for what, (mark, _) in WORKS_WITH.items())


def _table(records: Sequence[Mapping[str, Any]], left_out: Sequence[str], model: str | None) -> str:
    """The table, as wide as the terminal allows, with its legend."""
    from left_trainer.callbacks.tables import format_table
    from left_trainer.cli.method_records import short_paper
    from left_trainer.embedded import DEFAULT_MODEL
    from left_trainer.export.formats import FORMATS
    from left_trainer.methods.learning_rates import format_rate

    width = shutil.get_terminal_size(FALLBACK_SIZE).columns
    shown = model or DEFAULT_MODEL
    columns: dict[str, list[str]] = {
        "name": [record["name"] for record in records],
        "family": [record["family"] for record in records],
        "paper": [short_paper(record["paper"]) for record in records],
        "trained": [_trained(record, shown) for record in records],
        "rate": [format_rate(record["learning_rate_on_model"]) for record in records],
        "works with": [_marks(record) for record in records],
        "exports": [_exports(record["exports"]) for record in records],
    }
    for expendable in ("paper", "family", "exports"):
        if _width(columns) > width:
            del columns[expendable]
    room = width - _width(columns) - 2
    if room > SUMMARY_WIDTH:
        columns["what is trained"] = [textwrap.shorten(record["summary"], room, placeholder=" …") for record in records]
    marks = ", ".join(f"{mark} = {text}" for mark, text in WORKS_WITH.values())
    legend = [
        f"trained: trainable parameters with default options on {shown}, and their percentage; rate: default learning "
        "rate on that model.",
        f"works with: {marks}.",
        f"exports: what `left-trainer export --to` takes, of {', '.join(FORMATS)}.",
    ]
    if any(record["model"] != shown for record in records):
        legend.insert(1, "* decoder-only: counted on embedded/llama.")
    if left_out:
        legend.append(
            f"These do not work with default options on {shown}: {', '.join(left_out)}. `left-trainer methods NAME "
            f"--model {shown}` shows the reason."
        )
    legend.append("`left-trainer methods NAME` shows all details of a method.")
    table = format_table(f"Methods ({len(records)})", list(columns), list(zip(*columns.values(), strict=True)))
    return "\n".join([table, "", *(line for text in legend for line in textwrap.wrap(text, width - 2))])


def _exports(names: Sequence[str]) -> str:
    """Names of formats in short: the one that is missing, or those that there are."""
    from left_trainer.export.formats import FORMATS

    missing = [name for name in FORMATS if name not in names]
    return "all" if not missing else f"not {missing[0]}" if len(missing) == 1 else " ".join(names) or "-"


def _width(columns: Mapping[str, Sequence[str]]) -> int:
    return sum(2 + max(map(len, [header, *cells])) for header, cells in columns.items())


def _trained(record: Mapping[str, Any], shown: str) -> str:
    if record["trainable_parameters"] is None:
        return str(record["trainable_note"])
    mark = "" if record["model"] == shown else " *"
    return f"{record['trainable_parameters']:>11,} {record['trainable_percent']:>7.3f} %{mark}"


def _description(record: Mapping[str, Any]) -> str:
    """Everything about one method, as text."""
    from left_trainer.cli.method_records import learning_rate_text
    from left_trainer.methods import get_method
    from left_trainer.methods.learning_rates import format_rate
    from left_trainer.methods.options import known_options

    method = get_method(record["name"])
    trained = record["trainable_note"]
    if record["trainable_parameters"] is not None:
        trained = (
            f"{record['trainable_parameters']:,} parameters, {record['trainable_percent']:.3f} %, with default options"
        )
    lacks = _lacks(record)
    works = [text for what, (_, text) in WORKS_WITH.items() if what not in lacks]
    facts = [
        ("paper", record["paper"]),
        ("aliases", ", ".join(record["aliases"])),
        ("equation", record["equation"]),
        ("when to use", record["when_to_use"]),
        ("trained", f"{trained} (on {record['model']})"),
        ("learning rate", f"{format_rate(record['learning_rate_on_model'])} (on {record['model']})"),
        ("in general", learning_rate_text(method)),
        ("our defaults", _pairs({**record["defaults"], **record["hook_options"]})),
        ("fixed", _pairs(record["preset"])),
        *(("needs", f"{option}: {advice}") for option, advice in record["required"].items()),
        *(("needs", f"pip install {package}") for package in record["requires"].values()),
        ("works with", ", ".join(works)),
        ("exports", ", ".join(record["exports"]) or "none: serve the adapter with PEFT"),
        ("as a plain LoRA", {"exact": "without loss", "approximate": "approximated"}.get(record["plain_lora"], "")),
        *(("not with", f"{feature_text(what)}: {reason}") for what, reason in record["unsupported"].items()),
        ("PEFT config", record["config_class"] or ""),
        ("all options", ", ".join(known_options(method))),
    ]
    width = shutil.get_terminal_size(FALLBACK_SIZE).columns
    indent = " " * (max(len(label) for label, _ in facts) + 4)
    lines = [f"{method.name} ({method.family}): {method.summary}", ""]
    for label, text in facts:
        lines += textwrap.wrap(text, width, initial_indent=f"  {label}".ljust(len(indent)), subsequent_indent=indent)
    return "\n".join([*lines, "", *usage(method)])


def feature_text(what: str) -> str:
    """Description of a key of a method's `unsupported`."""
    return WORKS_WITH[what][1] if what in WORKS_WITH else "models with Conv1D layers, such as GPT-2"


def usage(method: Any) -> tuple[str, str]:
    """How to use `method` in Python and on the command line."""
    needed = [] if method.derive_from_data else list(method.required)
    in_python = ", ".join(f'"{name}": ...' for name in needed)
    in_shell = ",".join(f"{name}=..." for name in needed)
    model = "" if method.supports("encoder_decoder") else " --model_name_or_path embedded/llama"
    return (
        f'LeftTrainingArguments(peft_method="{method.name}"' + (f", peft_kwargs={{{in_python}}})" if needed else ")"),
        f"left-trainer train --task summarization{model} --peft_method {method.name}"
        + (f" --peft_kwargs {in_shell}" if needed else ""),
    )


def _pairs(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
