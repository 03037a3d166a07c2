"""What a command writes to the terminal beside its results."""

from __future__ import annotations

import subprocess

from processes import ENVIRONMENT

LOGS = """
import logging
from tqdm import tqdm
from left_trainer import run_program
def main():
    for step in tqdm(range(2), disable=None):
        logging.warning("of the root")
        logging.getLogger("left_trainer.trainer").warning("a sentence")
run_program(main)
"""


def test_what_is_logged_is_a_sentence_without_the_name_of_a_module(python):
    result = subprocess.run([python, "-c", LOGS], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert result.stderr.splitlines() == ["of the root", "a sentence"] * 2
