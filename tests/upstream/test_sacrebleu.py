"""sacreBLEU keeps the counts of each row where the scores of some of the rows are taken from."""

from __future__ import annotations

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

PREDICTIONS = ["the cat sat on the mat", "a dog barked at the moon all night", ""]
REFERENCES = ["a cat sat on the mat", "the dog barked at a moon", "nothing"]


@pytest.mark.parametrize("metric", [BLEU(), CHRF()])
def test_a_corpus_score_is_that_of_counts_summed_over_rows(metric):
    counts = np.array(metric._extract_corpus_statistics(PREDICTIONS, [REFERENCES]))
    score = metric._compute_score_from_stats(counts.sum(axis=0).tolist()).score
    assert score == metric.corpus_score(PREDICTIONS, [REFERENCES]).score
