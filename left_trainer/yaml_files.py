"""Reading a YAML file of arguments that a user has written."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML's own loader keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if key.tag == "tag:yaml.org,2002:str"]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice!r} stands twice in one mapping", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml_arguments(path: str) -> dict[str, Any]:
    """The arguments in a YAML file, by name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not YAML, or something else than a mapping of names to values.
    """
    if not Path(path).is_file():
        what = "is a directory" if Path(path).is_dir() else "does not exist"
        raise FileNotFoundError(f"config={path!r} {what}. Pass a YAML file.")
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config={path!r} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"config={path!r} must contain a mapping. Write lines such as `seed: 3`.")
    wrong = next((name for name in content if not isinstance(name, str)), None)
    if wrong is not None:
        raise ValueError(f"config={path!r} has the key {wrong!r}, which is not the name of an argument.")
    return content
