"""`plan.json`: what a comparison is to run, for every process that works on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from left_trainer.comparison.grid import Grid
from left_trainer.runs.json_records import from_json, read_json, write_json

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class PlanFile:
    """A planned comparison.

    Args:
        grid: Its cells.
        working_dir: Where the paths in their arguments begin.
        title: Of tables and page.
        command: That planned it.
    """

    grid: Grid
    working_dir: str
    title: str = ""
    command: str = ""

    def write(self, output_dir: Path) -> None:
        """Write `plan.json`, whole."""
        write_json(output_dir / PLAN_FILE, self)

    @classmethod
    def read(cls, output_dir: Path) -> PlanFile:
        """The plan in `output_dir`.

        Raises:
            FileNotFoundError: There is none.
            ValueError: The file is not a plan.
        """
        path = output_dir / PLAN_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"output_dir={str(output_dir)!r} has no {PLAN_FILE}. Plan the comparison first: `left-trainer compare "
                f"--plan --output_dir {output_dir} ...`."
            )
        try:
            return from_json(cls, read_json(path))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is not the plan of a comparison: {error}") from error
