"""The house: who imports whom, what importing costs, what the package promises."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import left_trainer
from left_trainer.embedded import MODEL_PATHS

PACKAGE = Path(left_trainer.__file__).parent
# From the bottom up: a module may import from its own level and from those before it.
LEVELS = [
    (
        "registry",
        "embedded",
        "token_mean",
        "secret_values",
        "shown_text",
        "storage",
        "interrupts",
        "recording",
        "ranges",
        "argument_parser",
        "yaml_files",
        "plugins",
        "processes",
        "imports",
    ),
    ("tuners", "adapters", "models"),
    ("methods", "tasks"),
    ("training_args", "fast_path_args", "argument_ranges", "argument_checks", "compression_options"),
    ("compression", "callbacks", "evaluation", "data", "kernels"),
    ("trainer",),
    ("planning",),
    ("runs",),
    ("comparison", "export"),
    ("cli",),
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
MAX_PACKAGE_BYTES = 12 * 1024**2


MODULES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
# Objects that hold what a user asked for; a name in front of the last one does not matter, `trainer.args`.
ARGUMENTS = ("args", "model_args", "data_args", "arguments")


def room(path: Path) -> str:
    """The first part of a module's name below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def dotted(path: Path) -> str:
    """`left_trainer.models.source`; a package goes by its own name."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Modules of the package that a module imports, wherever in it; for the eyes of a type checker alone left out."""
    names = {dotted(path) for path in MODULES}
    for_types = {
        id(child)
        for node in ast.walk(MODULES[path])
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(MODULES[path]):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in names else node.module for name in modules}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in names}
    return found - {dotted(path)}


def test_imports_point_downwards():
    for path in MODULES:
        if room(path) == "__init__":
            continue
        assert room(path) in LEVEL_OF, f"{room(path)} has no level"
        for name in imports(path) - {PACKAGE.name}:
            imported = name.split(".")[1]
            assert LEVEL_OF[imported] <= LEVEL_OF[room(path)], f"{path} imports {name}"


def test_no_imports_run_in_a_circle():
    """Neither among modules nor among rooms."""
    modules = {dotted(path): imports(path) for path in MODULES}
    list(TopologicalSorter(modules).static_order())
    rooms: dict[str, set[str]] = {}
    for path in MODULES:
        rooms.setdefault(room(path), set()).update(
            name.split(".")[1] for name in imports(path) if "." in name and name.split(".")[1] != room(path)
        )
    list(TopologicalSorter(rooms).static_order())


def test_only_the_trainer_extends_a_trainer():
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and room(path) != "trainer":
                bases = [ast.unparse(base) for base in node.bases]
                assert not any(base.endswith("Trainer") for base in bases), f"{path}: {node.name}"


def test_there_is_one_place_for_the_loss():
    """Overrides of `compute_loss` would each have an order of their own."""
    places = [
        path.relative_to(PACKAGE).as_posix()
        for path, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "compute_loss"
    ]
    assert places == ["trainer/losses.py"]


def test_arguments_are_read_and_not_written():
    """What is derived from them lives in a copy or in the object that derived it."""
    for path, tree in MODULES.items():
        if room(path) == "training_args":
            continue
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) else ():
                for part in ast.walk(target):
                    if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                        owner = ast.unparse(part.value).rpartition(".")[2]
                        assert owner not in ARGUMENTS, f"{path}:{node.lineno} writes to {ast.unparse(part)}"


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


def test_a_training_imports_what_it_may_not_need_when_it_needs_it():
    """Neither what computes scores, nor plots, nor what one method alone uses."""
    script = (
        "import sys, transformers, peft\n"
        "from trl import SFTTrainer\n"
        "before = set(sys.modules)\n"
        "import left_trainer.cli.train, left_trainer.runs.tuning, left_trainer.trainer.trainer\n"
        "late = {'evaluate', 'rouge_score', 'sacrebleu', 'nltk', 'sklearn', 'matplotlib', 'bitsandbytes'}\n"
        "assert not late & set(sys.modules) - before, late & set(sys.modules) - before"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


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
    for path in MODULES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 400, f"{path} has {lines} lines"


def test_recipes_use_public_names_alone():
    for path in sorted((PACKAGE.parent / "recipes").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
                assert node.module == PACKAGE.name, f"{path.name} imports from {node.module}"
                assert {alias.name for alias in node.names} <= set(left_trainer.__all__)
