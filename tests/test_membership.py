"""The membership benchmark's own arithmetic: AUROC and TPR at 5 % FPR, ties counting half."""

import numpy as np
import pytest

from tests.benchmarks.membership import judge, tell


def test_by_hand():
    found = tell(np.array([0.9, 0.8, 0.6, 0.5]), np.array([0.7, 0.55, 0.4, 0.3]))
    assert found.auroc == pytest.approx(0.8125)
    assert found.tpr == 0.5  # the first false alarm is one in four, more than 5 %


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_the_share_of_pairs_in_order_and_turns_with_the_scores(seed):
    rng = np.random.default_rng(seed)
    one, two = rng.integers(0, 12, 40).astype(float), rng.integers(0, 10, 60).astype(float)
    pairs = (one[:, None] > two).mean() + (one[:, None] == two).mean() / 2
    assert tell(one, two).auroc == pytest.approx(pairs)
    assert tell(-one, -two).auroc == pytest.approx(1 - pairs)
    assert tell(two, one).auroc == pytest.approx(1 - pairs)


def test_the_threshold_is_the_last_one_with_at_most_five_per_cent_false():
    others = np.arange(100.0)  # the threshold 95 has five of them at or above it
    assert tell(np.array([94.0, 95.0, 96.0, 200.0]), others).tpr == 0.75
    assert tell(np.array([94.0, 95.0, 96.0, 200.0]), np.append(others, 95.0)).tpr == 0.5  # a tie is not split


def test_the_interval_of_equal_halves_has_chance_in_it_and_that_of_moved_ones_has_not():
    rng = np.random.default_rng(3)
    one, two = rng.normal(size=300), rng.normal(size=300)
    assert judge(one, two).chance
    assert not judge(one + 1, two).chance
    assert judge(one + 1, two).low.auroc > 0.7
