"""What left_trainer uses of other packages' internals and works around in them, read from its source and classes."""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import left_trainer

PACKAGE = Path(left_trainer.__file__).parent
LIBRARIES = ("accelerate", "bitsandbytes", "ctranslate2", "datasets", "peft", "torch", "transformers", "trl")
STAMP = re.compile(rf"\b({'|'.join(LIBRARIES)})\b[\s#(]+\d+\.\d+", re.IGNORECASE)
DEEP = 3  # A module path of so many parts is no public API, but for torch, whose documented modules are that deep.
ATTRIBUTE_FUNCTIONS = ("getattr", "hasattr", "setattr", "delattr")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def sources() -> dict[Path, tuple[str, ast.Module]]:
    """Text and syntax tree of every module of the package."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    return {path: (text, ast.parse(text)) for path, text in texts.items()}


def stamps() -> list[tuple[str, str]]:
    """(place, library) of every version that a comment or docstring names."""
    return [
        (place_of_line(tree, path, text.count("\n", 0, found.start()) + 1), found[1].lower())
        for path, (text, tree) in sources().items()
        for found in STAMP.finditer(text)
    ]


def place_of_line(tree: ast.Module, path: Path, line: int) -> str:
    """Name of the function or method around a line, else of the class or constant, else of the module."""
    place, body = path.stem, tree.body
    while True:
        around = next((node for node in body if node.lineno <= line <= (node.end_lineno or 0)), None)
        if isinstance(around, ast.Assign) and isinstance(around.targets[0], ast.Name) and body is tree.body:
            return around.targets[0].id
        if not isinstance(around, (ast.ClassDef, *Function.__args__)):
            return place
        place, body = around.name, around.body
        if isinstance(around, Function):
            return place


@functools.cache
def definitions() -> dict[str, Path]:
    """The module of every function, class, method and constant, and of every module by its own name."""
    found = {}
    for path, (_, tree) in sources().items():
        found[path.stem] = path
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, *Function.__args__)):
                found[node.name] = path
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            found |= {target.id: path for target in targets if isinstance(target, ast.Name)}
    return found


def home(name: str) -> str:
    """Where `name` is now, for a message: "initialize_loftq in left_trainer/methods/lora_hooks.py"."""
    path = definitions()[name].relative_to(PACKAGE.parent).as_posix()
    return path if definitions()[name].stem == name else f"{name} in {path}"


def constant(name: str) -> Any:
    """The value of a constant, from the module that it is in now."""
    module = definitions()[name].relative_to(PACKAGE.parent).with_suffix("").parts
    return getattr(importlib.import_module(".".join(module)), name)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_own_object(node: ast.expr) -> bool:
    """`self`, `cls`, `super()`, `type(self)`."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("super", "type")
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_attributes(tree: ast.AST) -> Iterator[tuple[str, bool, bool]]:
    """Every private attribute that code names: its name, whether of the object itself, whether it is set there."""
    added = {id(node.target) for node in ast.walk(tree) if isinstance(node, ast.AugAssign)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            is_set = isinstance(node.ctx, ast.Store) and id(node) not in added
            yield node.attr, is_own_object(node.value), is_set
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ATTRIBUTE_FUNCTIONS:
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if is_private(str(name)):
                yield str(name), is_own_object(node.args[0]), False


def private_imports(tree: ast.AST) -> Iterator[str]:
    """Names imported from upstream that are private by their own or their module's name, or deep and not exported."""
    for node in ast.walk(tree):
        parts = (getattr(node, "module", None) or "").split(".") if isinstance(node, ast.ImportFrom) else [""]
        if parts[0] not in LIBRARIES:
            continue
        top = importlib.import_module(parts[0])
        is_deep = len(parts) >= DEEP and parts[0] != "torch"
        for alias in node.names:
            if any(map(is_private, (alias.name, *parts))) or (is_deep and not hasattr(top, alias.name)):
                yield alias.name


def package_classes() -> list[type]:
    names = [found.name for found in pkgutil.walk_packages(left_trainer.__path__, f"{left_trainer.__name__}.")]
    # A kernel's source is Triton's, which is there with a GPU alone.
    modules = [importlib.import_module(name) for name in names if not name.endswith("_triton")]
    found = {item for module in modules for item in vars(module).values() if isinstance(item, type)}
    return [item for item in found if is_ours(item)]


def is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == left_trainer.__name__


@functools.cache
def names_of(cls: type) -> frozenset[str]:
    """Private names that an upstream class has, those that its methods set among them."""
    file = sys.modules[cls.__module__].__file__ or ""
    text = Path(file).read_text(encoding="utf-8") if file.endswith(".py") else ""
    return frozenset(
        {*vars(cls), *getattr(cls, "__annotations__", {}), *re.findall(r"\bself\.(_\w+)(?::.*)? = ", text)}
    )


def inherited_names() -> set[str]:
    """Private names that a class of the package uses or overrides and that one of its upstream bases has."""
    classes = package_classes()
    bodies = {
        node.name: node for _, tree in sources().values() for node in ast.walk(tree) if type(node) is ast.ClassDef
    }
    found = set()
    for cls in classes:
        if cls.__name__ not in bodies:
            continue
        body = bodies[cls.__name__]
        used = {name for name, is_own, _ in private_attributes(body) if is_own}
        used |= {node.name for node in body.body if isinstance(node, Function) and is_private(node.name)}
        # A mixin's bases are those of the classes that it is mixed into.
        bases = {base for other in classes if cls in other.__mro__ for base in other.__mro__ if not is_ours(base)}
        found |= used & {
            name for base in bases if base.__module__.split(".")[0] in LIBRARIES for name in names_of(base)
        }
    return found


def internals() -> set[str]:
    """Every private name of another package that this one uses."""
    trees = [tree for _, tree in sources().values()]
    attributes = [found for tree in trees for found in private_attributes(tree)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    defined = {node.name for node in nodes if isinstance(node, (ast.ClassDef, *Function.__args__))}
    defined |= {name for name, is_own, is_set in attributes if is_own and is_set}
    in_bodies = {
        name for node in nodes if isinstance(node, ast.ClassDef) for item in node.body for name in assigned(item)
    }
    on_self = {name for name, is_own, _ in attributes if is_own} - in_bodies
    on_others = {name for name, is_own, _ in attributes if not is_own}
    imported = {name for tree in trees for name in private_imports(tree)}
    return imported | inherited_names() | ((on_self | on_others) - defined)


def assigned(node: ast.stmt) -> list[str]:
    """Names that a statement of a class body gives a value."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    has_value = getattr(node, "value", None) is not None
    return [target.id for target in targets if has_value and isinstance(target, ast.Name)]
