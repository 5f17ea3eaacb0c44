"""Laws of the metrics at the edges of what they take."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdlib import metrics


@pytest.mark.parametrize("where", ["predictions", "labels"])
def test_f1_refuses_a_third_class_on_either_side(where):
    sides = {"predictions": np.array([0, 1, 1]), "labels": np.array([1, 1, 0])}
    with pytest.raises(ValueError, match="2"):
        metrics.f1(**sides | {where: np.array([0, 1, 2])})


@given(st.floats(1e-9, 1e-3), st.integers(0, 99))
def test_scores_that_differ_little_correlate_like_those_that_differ_much(spread, seed):
    """A regression head before it has learned: all answers close to one number.  Only rounding is no variation."""
    generator = np.random.default_rng(seed)
    scores, labels = generator.normal(size=12), generator.normal(size=12)
    expected = np.corrcoef(scores, labels)[0, 1]
    assert metrics.pearson(3 + spread * scores, labels) == pytest.approx(expected, abs=1e-5)
    assert metrics.pearson(labels, 3 + spread * scores) == pytest.approx(expected, abs=1e-5)


@given(st.integers(0, 99), st.permutations(range(8)))
def test_the_order_of_the_samples_does_not_matter(seed, order):
    generator = np.random.default_rng(seed)
    classes, scores = generator.integers(0, 2, (2, 8)), generator.normal(size=(2, 8))
    for known, (ours, theirs) in ((metrics.CLASSIFICATION, classes), (metrics.REGRESSION, scores)):
        for metric in known.values():
            assert metric(ours[order], theirs[order]) == pytest.approx(metric(ours, theirs), abs=1e-12)
