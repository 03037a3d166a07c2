"""A user's own methods and tasks: a Python file or a module that a command is given, and installed packages.

Whatever registers records with `register_method` or `register_task` when it is imported is a plugin. A package that is
to be found by itself names such a module in its entry points:

    [project.entry-points.left_trainer]
    my_methods = "my_package.methods"
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from left_trainer.yaml_files import read_yaml_arguments

GROUP = "left_trainer"
PLUGIN = "plugin"
logger = logging.getLogger(__name__)


def add_plugin_option(parser: argparse.ArgumentParser) -> None:
    """`--plugin`, which may be given several times and in the YAML file of `--config`."""
    parser.add_argument(
        f"--{PLUGIN}",
        action="extend",
        nargs="+",
        metavar="FILE",
        help="Python file, or name of a module, that registers methods and tasks",
    )


def plugins_in(words: Sequence[str]) -> list[str]:
    """The plugins that a command line, or the YAML file that it names, asks for.

    Raises:
        ValueError: The YAML file cannot be read, or holds something else than names.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    add_plugin_option(parser)
    try:
        options, _ = parser.parse_known_args(list(words))
    except argparse.ArgumentError:  # the parser of the command says what is wrong
        return []
    of_file: Any = read_yaml_arguments(options.config).get(PLUGIN) if options.config else None
    names = [of_file] if isinstance(of_file, str) else of_file or []
    if not isinstance(names, list) or any(not isinstance(name, str) for name in names):
        raise ValueError(f"config={options.config!r} has {PLUGIN}={of_file!r}. Expected a file or a module, or a list.")
    return [*names, *(options.plugin or [])]


def load_plugins(names: Iterable[str]) -> tuple[str, ...]:
    """Import plugins, each once.

    Args:
        names: Paths of Python files, or names of modules, also in the current folder.

    Returns:
        The same, paths made absolute, for other processes.

    Raises:
        ValueError: One of them does not exist or cannot be imported.
    """
    return tuple(_load(name) for name in dict.fromkeys(names))


def _load(name: str) -> str:
    path = Path(name).expanduser().absolute()
    is_file = path.suffix == ".py" or path.exists() or "/" in name
    if is_file and not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"plugin={name!r} {what}. Pass a Python file, or the name of a module.")
    module = path.stem if is_file else name
    folder = str(path.parent if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # also for what it imports, and for processes that this one starts
    if is_file:
        _check_name(module, path)
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"plugin={name!r} {_why_not(error, module)}") from error
    return str(path) if is_file else name


def _check_name(module: str, path: Path) -> None:
    """Raise `ValueError` where Python would import another module than the file."""
    if not module.isidentifier():
        raise ValueError(f"plugin={str(path)!r} is no name of a module. Use letters, digits and underscores alone.")
    importlib.invalidate_caches()
    loaded = sys.modules.get(module)
    found = getattr(loaded, "__file__", None) if loaded else getattr(importlib.util.find_spec(module), "origin", None)
    if found is None or not Path(found).exists() or not Path(found).samefile(path):
        raise ValueError(
            f"plugin={str(path)!r} has the name of another module, {found or 'one that is built in'}. Rename the file."
        )


def _why_not(error: BaseException, module: str) -> str:
    """Why an import failed, and where, in one line."""
    if isinstance(error, ModuleNotFoundError) and error.name == module:
        return "is neither a Python file nor a module that can be imported. Install it, or pass the path of a file."
    if isinstance(error, SyntaxError):
        place = f"{error.filename}, line {error.lineno}"
    else:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
        place = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else "before its first line"
    text = " ".join(str(error).split())
    return f"cannot be loaded: {type(error).__name__}: {text} ({place})."


@functools.cache
def load_installed_plugins() -> None:
    """Import the entry points of the group `left_trainer`, once. One that is broken is named and left out."""
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            point.load()
        except (Exception, SystemExit) as error:
            package = point.dist.name if point.dist else "a package"
            logger.warning("The plugin %r of %s %s", point.name, package, _why_not(error, point.module))
