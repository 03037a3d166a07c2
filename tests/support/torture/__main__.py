"""Run the campaign and print its table: `make torture`, or with options `make torture TORTURE="--minutes 10"`."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm.auto import tqdm

from fork_server import start_server
from processes import ENVIRONMENT
from torture.case import MODULES, Case, NotRunError, all_cases


def main() -> int:
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__, allow_abbrev=False)
    parser.add_argument("--kinds", nargs="+", choices=MODULES, default=MODULES, help="what to try (default: all)")
    parser.add_argument("--match", default="", help="only the cases whose name contains this text")
    parser.add_argument("--minutes", type=float, help="start no further case after this long (default: run all)")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which the cases run")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="cases at the same time")
    parser.add_argument("--list", action="store_true", help="print the cases and what is expected, and run nothing")
    options = parser.parse_args()
    cases = [case for case in all_cases(tuple(options.kinds)) if options.match in case.name]
    if options.list:
        print("\n".join(f"{case.kind:10} {case.name}: {case.expected}" for case in cases))
        return 0
    random.Random(options.seed).shuffle(cases)
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    failures, ran = _run(cases, options.workers, deadline)
    _print_table(cases, failures, ran)
    return 1 if failures else 0


def _run(cases: Sequence[Case], workers: int, deadline: float) -> tuple[dict[Case, str], Counter[str]]:
    """What went wrong in which case, and how many cases of each kind ran."""
    failures: dict[Case, str] = {}
    ran: Counter[str] = Counter()

    def attempt(case: Case) -> str | None:
        if time.monotonic() > deadline:
            return None
        with tempfile.TemporaryDirectory(prefix="torture-") as folder:
            try:
                case.check(Path(folder))
            except NotRunError as error:
                tqdm.write(f"NOT RUN {case.kind} {case.name}: {error}")
                return None
            except Exception as error:  # a case that breaks is a case that is not right
                return f"{type(error).__name__}: {error}"
        return ""

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        server, python = start_server(Path(folder), ENVIRONMENT)
        os.environ["TORTURE_PYTHON"] = str(python)
        futures = {pool.submit(attempt, case): case for case in cases}
        for future in tqdm(as_completed(futures), total=len(futures), unit="case"):
            case, failure = futures[future], future.result()
            if failure is None:
                continue
            ran[case.kind] += 1
            if failure:
                failures[case] = failure
                tqdm.write(f"WRONG {case.kind} {case.name}\n  expected: {case.expected}\n  {failure[-1500:]}")
        server.stdin.close()
        server.wait()
    return failures, ran


def _print_table(cases: Sequence[Case], failures: dict[Case, str], ran: Counter[str]) -> None:
    print(f"{'kind':12}{'cases':>8}{'right':>8}{'wrong':>8}{'not run':>10}")
    listed, wrong = Counter(case.kind for case in cases), Counter(case.kind for case in failures)
    for kind, count in listed.items():
        print(f"{kind:12}{count:8}{ran[kind] - wrong[kind]:8}{wrong[kind]:8}{count - ran[kind]:10}")
    for case in failures:
        print(f"WRONG {case.kind} {case.name}: expected: {case.expected}")


if __name__ == "__main__":
    sys.exit(main())
