"""Pages of the methods, made from the registry while mkdocs builds the site; nothing is written into docs/.

A hook of mkdocs, named in mkdocs.yml: it adds one page for each method, fills the overview in methods/index.md, lists
the pages in the navigation, and turns LaTeX into MathML, which browsers show without scripts or network.
"""

from __future__ import annotations

import dataclasses
import enum
import html
import inspect
import re
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig

from left_trainer.cli.method_records import counting_models, default_model, learning_rate_text
from left_trainer.cli.methods import FAMILIES, OF_THE_MODEL, WORKS_WITH, feature_text, usage, works_with
from left_trainer.export.formats import FORMATS, formats_of
from left_trainer.methods import PeftMethod, list_methods
from left_trainer.methods.learning_rates import NARROW, WIDE, format_rate
from left_trainer.methods.options import known_options

OVERVIEW_MARK = "<!-- overview of the methods -->"
INDEX = "methods/index.md"
EXPORTS_MARK, EXPORTS = "<!-- exports of the methods -->", "exporting.md"
PEFT_DOCUMENTATION = "https://huggingface.co/docs/peft"
# Options that PEFT keeps for every method and a user has no need of.
COMMON_OPTIONS = {field.name for field in dataclasses.fields(PeftConfig)}
SNIPPET = """from left_trainer import LeftTrainer, LeftTrainingArguments

args = {arguments}
trainer = LeftTrainer(model, args, train_dataset=rows)"""
PLACES = {
    "input": "before the input; they take positions of the sequence, or of the encoder",
    "decoder_cache": "in the key/value cache; they take positions of the sequence, or of the decoder",
}
HOOKS = {
    "resolve_targets": "Picks target modules by their names for model types that PEFT has no default for.",
    "derive": "Takes options from the model's shape where you set none.",
    "derive_from_data": "Takes options from the first training row where you set none.",
    "quantization": "Loads the base model quantized.",
    "prepare": "Changes how the wrapped model computes, where PEFT's way does not fit training or generation.",
    "initialize": "Sets the adapter's weights before the first step; not again when a run is resumed.",
    "restore": "Gives the model the shape of a saved adapter before that is loaded.",
    "optimizer": "Brings its own optimizer.",
    "callback": "Acts during training.",
    "loss": "Has its own loss.",
    "penalty": "Adds a term to the loss, once for each optimizer step.",
    "training_state": "Saves and restores what training goes on from and PEFT's adapter file leaves out.",
}


def method_page(method: PeftMethod) -> str:
    """The page of `method`, in Markdown with LaTeX."""
    in_python, in_shell = usage(method)
    sections = {
        "": _facts(method),
        "Equation": f"$$\n{method.equation}\n$$" if method.equation else "",
        "When to use it": method.when_to_use,
        "Use": f"```python\n{SNIPPET.format(arguments=in_python)}\n```\n\n```bash\n{in_shell}\n```",
        "What it needs": _needs(method),
        "What it works with": _works_with(method),
        "What LEFT adds": _hooks(method),
        "Options": _options(method),
    }
    parts = [f"# {method.name}", f"{method.summary[0].upper()}{method.summary[1:]}."]
    for heading, text in sections.items():
        if text:
            parts += [f"## {heading}", text] if heading else [text]
    return "\n\n".join(parts) + "\n"


def _facts(method: PeftMethod) -> str:
    arxiv = re.search(r"arXiv (\d{4}\.\d{4,5})", method.paper)
    config = method.config_class
    facts = {
        "Family": f"[{FAMILIES[method.family]}](index.md#{FAMILIES[method.family].replace(' ', '-')})",
        "Paper": f"[{method.paper}](https://arxiv.org/abs/{arxiv[1]})" if arxiv else method.paper,
        "Default learning rate": learning_rate_text(method),
        "Further names": ", ".join(f"`{alias}`" for alias in method.aliases),
        "Virtual tokens": PLACES[method.virtual_tokens.place] if method.virtual_tokens else "",
        "PEFT config": f"`{config.__name__}`" if config else "none: the model's own parameters are trained",
    }
    return "\n".join(f"- **{label}**: {text}" for label, text in facts.items() if text)


def _needs(method: PeftMethod) -> str:
    options = [f"- `{name}`: {advice}" for name, advice in method.required.items()]
    return "\n".join([*options, *(f"- `pip install {package}`" for package in method.requires.values())])


def _works_with(method: PeftMethod) -> str:
    works = ", ".join(
        text for what, (_, text) in WORKS_WITH.items() if what not in OF_THE_MODEL and works_with(method, what)
    )
    lacks = [f"- Not with {feature_text(what)}: {reason}" for what, reason in method.unsupported.items()]
    if not method.mergeable and method.config_class is not None:
        lacks.append("- Not with merging into the base: the adapter stays beside the model.")
    return "\n".join([f"{works[0].upper()}{works[1:]}.", "", *lacks]).strip()


def _hooks(method: PeftMethod) -> str:
    lines = []
    for name, text in HOOKS.items():
        hook = getattr(method, name)
        if hook is not None:
            is_ours = inspect.isfunction(hook) or inspect.isclass(hook)
            own_words = (inspect.getdoc(hook) or "").split("\n\n")[0].replace("\n", " ") if is_ours else ""
            lines.append(f"- {text} {own_words}".rstrip())
    return "\n".join(lines)


def _options(method: PeftMethod) -> str:
    known = {name: hint for name, hint in known_options(method).items() if name not in COMMON_OPTIONS}
    if not known:
        return "None."
    config_fields = dataclasses.fields(method.config_class) if method.config_class else ()
    fields = {field.name: field for field in config_fields}
    set_by_us = {**method.required, **method.preset, **method.defaults}
    is_ours = bool(method.config_class) and method.config_class.__module__.startswith("left_trainer.")
    # What the user has to know first: what is needed, fixed or set by us.
    names = sorted(known, key=lambda name: (name in fields and name not in set_by_us, name))
    rows = [
        (
            f"`{name}`",
            f"`{_type(known[name])}`",
            f"`{_value(_default(method, name, fields))}`",
            _note(method, name, fields),
        )
        for name in names
    ]
    source = "" if is_ours else f"\n\n[PEFT's documentation]({PEFT_DOCUMENTATION}) says what its options mean."
    return f"For `peft_kwargs`.{source}\n\n" + _table("option", "type", "default", "", rows=rows)


def _default(method: PeftMethod, name: str, fields: Mapping[str, dataclasses.Field]) -> Any:
    ours = {**method.hook_options, **method.defaults, **method.preset}
    return ours[name] if name in ours else _peft_default(fields[name])


def _peft_default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _note(method: PeftMethod, name: str, fields: Mapping[str, dataclasses.Field]) -> str:
    if name in method.required:
        return "**needed**"
    if name in method.preset:
        return "**fixed**: it makes the method what it is"
    if name not in fields:
        return "LEFT's own"
    help_text = ""
    if method.config_class.__module__.startswith("left_trainer."):
        help_text = fields[name].metadata.get("help", "")
    elif name in method.defaults and method.defaults[name] != _peft_default(fields[name]):
        help_text = f"**set by LEFT**; PEFT's is `{_value(_peft_default(fields[name]))}`"
    return help_text


def _type(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) else str(hint)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text).replace("NoneType", "None").lstrip("~")


def _value(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return repr(value.value)
    return f"{type(value).__name__}()" if dataclasses.is_dataclass(value) else repr(value)


def _table(*header: str, rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *rows))


def overview() -> str:
    """The methods by family, with links to their pages."""
    parts = []
    for family, title in FAMILIES.items():
        rows = [
            (
                f"[`{method.name}`]({method.name}.md)",
                method.summary,
                format_rate(method.learning_rate),
                format_rate(method.default_learning_rate(NARROW)),
                "-" if method.config_class is None else "yes" if method.mergeable else "no",
            )
            for method in _sorted_methods()
            if method.family == family
        ]
        parts += [
            f"### {title[0].upper()}{title[1:]}",
            _table("method", "what is trained", f"rate at {WIDE}", f"at {NARROW}", "merges", rows=rows),
        ]
    return "\n\n".join(parts)


def exports() -> str:
    """Which method can be exported to which format."""
    models = counting_models(None)
    header = ("method", *FORMATS)
    rows = []
    for method in _sorted_methods():
        kind = models[default_model(method)].count(method).plain_lora
        marks = dict.fromkeys(formats_of(method, kind), "yes")
        if kind is not None:
            marks["lora"] = "exact" if kind == "exact" else "approximated"
        rows.append((f"[`{method.name}`](methods/{method.name}.md)", *(marks.get(name, "-") for name in FORMATS)))
    return _table(*header, rows=rows)


def _sorted_methods() -> list[PeftMethod]:
    return sorted(list_methods(), key=lambda method: method.name)


def to_mathml(page: str) -> str:
    """`page` with the LaTeX that arithmatex marked turned into MathML."""
    from latex2mathml.converter import convert

    def replace(match: re.Match[str]) -> str:
        latex = html.unescape(match["latex"]).strip().replace(r"\tfrac", r"\frac")
        display = "block" if match["tag"] == "div" else "inline"
        return convert(latex, display=display).replace(r"\%", "%")

    pattern = r'<(?P<tag>div|span) class="arithmatex">\\[\[(](?P<latex>.*?)\\[\])]</(?P=tag)>'
    return re.sub(pattern, replace, page, flags=re.DOTALL)


def on_config(config: Any) -> Any:
    """List the pages in the navigation."""
    pages = [
        {
            f"{title[0].upper()}{title[1:]}": [
                {method.name: f"methods/{method.name}.md"} for method in _sorted_methods() if method.family == family
            ]
        }
        for family, title in FAMILIES.items()
    ]
    config.nav = [{"Methods": [INDEX, *pages]} if INDEX in entry.values() else entry for entry in config.nav]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    from mkdocs.structure.files import File

    for method in list_methods():
        files.append(File.generated(config, f"methods/{method.name}.md", content=method_page(method)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the overview, and the table of exports."""
    if page.file.src_uri == EXPORTS:
        return markdown.replace(EXPORTS_MARK, exports())
    return markdown.replace(OVERVIEW_MARK, overview()) if page.file.src_uri == INDEX else markdown


def on_page_content(content: str, **_: Any) -> str:
    return to_mathml(content)
