"""Batches of rows of like length, and how their results are put together."""

from __future__ import annotations

import numpy as np

from left_trainer.evaluation.batches import batches_of_similar_length, join_batches, without_filling


def test_short_rows_form_larger_batches():
    lengths = [30, 5, 10, 6, 28, 7, 8, 9]
    batches = batches_of_similar_length(lengths, lengths, batch_size=2)
    assert sorted(row for batch in batches for row in batch) == list(range(8))
    assert [lengths[row] for batch in batches for row in batch] == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches] == [2, 6]  # 2 x 30 tokens, and as many: 6 x 10
    assert batches_of_similar_length([3, 3, 3], [3, 3, 3], batch_size=2) == [[0, 1], [2]]
    assert [len(batch) for batch in batches_of_similar_length([100, *[1] * 20], [100, *[1] * 20], 2)] == [2, 8, 8, 3]
    assert batches_of_similar_length([], [], 4) == []


def test_a_rows_own_end():
    def cut(*tokens):
        return without_filling(np.array(tokens), [1, 9], 0).tolist()

    assert cut(0, 5, 6, 1, 0, 0) == [0, 5, 6, 1]
    assert cut(0, 5, 6, 1, 1, 1) == [0, 5, 6, 1]  # as beam search fills up where the padding token's id is 0
    assert cut(0, 5, 9, 0) == [0, 5, 9]
    assert cut(0, 5, 6) == [0, 5, 6]
    assert cut(0, 5, 0) == [0, 5]
    assert cut(1) == [1]
    assert cut(0, 1, 0, 0) == [0, 1]
    assert without_filling(np.array([5, 1, 1]), [1], 1).tolist() == [5, 1]  # padded with the end of sequence


def test_joining_batches():
    joined = join_batches([np.array([[1, 2]]), np.array([[3], [4]])])
    assert joined.tolist() == [[1, 2], [3, -100], [4, -100]]
    assert join_batches([np.array([1.0]), np.array([2.0])]).tolist() == [1, 2]
    assert join_batches(None) is None
