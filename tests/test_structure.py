"""The house: who imports whom, what importing costs, what the package promises."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import left_trainer
from left_trainer.embedded import MODEL_PATHS

PACKAGE = Path(left_trainer.__file__).parent
# From the bottom up: a module may import from its own level and from those before it.
LEVELS = [
    ("registry", "embedded", "token_mean"),
    ("tuners", "adapters", "models"),
    ("methods", "tasks"),
    ("training_args",),
    ("compression", "callbacks", "evaluation", "data", "kernels"),
    ("trainer",),
    ("planning",),
    ("runs",),
    ("comparison", "export"),
    ("cli",),
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
MAX_PACKAGE_BYTES = 12 * 1024**2


def imports(path: Path) -> set[str]:
    """First parts, below the package, of what a module imports from the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("left_trainer"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("left_trainer.")}
    return found


def test_imports_point_downwards():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in LEVEL_OF, f"{room} has no level"
        for imported in imports(path) - {"__version__"}:
            assert LEVEL_OF[imported] <= LEVEL_OF[room], f"{path} imports {imported}"


def test_only_methods_tuners_and_kernels_know_types_of_peft():
    """Elsewhere a method's record is asked, which holds for the methods of users too."""
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("methods", "tuners", "kernels"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = (getattr(node, "id", None), getattr(node, "attr", None))  # a name, an attribute
            imported = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            assert "PeftType" not in (*named, *imported), path


def test_adapters_know_neither_models_nor_methods():
    for path in (PACKAGE / "adapters").glob("*.py"):
        assert not imports(path) & {"models", "methods"}, path


def test_importing_the_package_and_asking_for_help_load_nothing_heavy():
    script = (
        "import sys, left_trainer\n"
        "from left_trainer.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "left-trainer train --task summarization" in result.stdout


def test_every_public_name_resolves():
    assert set(left_trainer.__all__) == {*left_trainer._HOMES, "__version__"}
    for name in left_trainer.__all__:
        assert getattr(left_trainer, name) is not None
        assert name in dir(left_trainer)


def test_the_package_promises_what_the_project_file_says():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    assert project["version"] == left_trainer.__version__
    assert (PACKAGE / "py.typed").exists()
    constraints = (PACKAGE.parent / "constraints.txt").read_text()
    for dependency in project["dependencies"]:
        name = dependency.split(">")[0].replace("-", "_").lower()
        assert any(line.lower().replace("-", "_").startswith(f"{name}==") for line in constraints.splitlines()), name
        assert "==" not in dependency


def test_the_embedded_models_are_small_and_described():
    files = [path for folder in MODEL_PATHS.values() for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_PACKAGE_BYTES
    for folder in MODEL_PATHS.values():
        card = (folder / "README.md").read_text()
        assert "left_trainer.embedded.pretrain" in card


def test_modules_stay_small():
    for path in PACKAGE.rglob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 400, f"{path} has {lines} lines"
