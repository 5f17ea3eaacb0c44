import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from sklearn import metrics as sklearn_metrics

from kdlib import metrics

LENGTHS = st.integers(2, 40)
CLASSES = LENGTHS.flatmap(lambda n: hnp.arrays(np.int64, (2, n), elements=st.integers(0, 1)))
# Scores on a grid of thousandths: ties are likely, and no difference drowns in rounding.
SCORES = LENGTHS.flatmap(lambda n: hnp.arrays(np.int64, (2, n), elements=st.integers(-5000, 5000))).map(
    lambda whole: whole / 1000
)


@settings(max_examples=40)
@given(CLASSES)
def test_class_metrics_are_those_of_scikit_learn(pair):
    predictions, labels = pair
    assert metrics.accuracy(predictions, labels) == np.mean(predictions == labels)
    assert metrics.f1(predictions, labels) == sklearn_metrics.f1_score(labels, predictions, zero_division=0.0)
    assume(len(set(predictions)) == 2 and len(set(labels)) == 2)
    expected = np.corrcoef(predictions, labels)[0, 1]  # Matthews correlation is the correlation of two indicators
    assert metrics.matthews_correlation(predictions, labels) == pytest.approx(expected, abs=1e-12)


@given(SCORES)
def test_score_metrics_are_those_of_scipy(pair):
    predictions, labels = pair
    assume(np.ptp(predictions) > 0 and np.ptp(labels) > 0)
    assert metrics.pearson(predictions, labels) == pytest.approx(stats.pearsonr(predictions, labels)[0], abs=1e-9)
    ranks = [stats.rankdata(values) for values in pair]
    assert metrics.spearmanr(predictions, labels) == pytest.approx(np.corrcoef(ranks)[0, 1], abs=1e-9)


@given(SCORES)
def test_spearman_sees_only_the_order(pair):
    predictions, labels = pair
    value = metrics.spearmanr(predictions, labels)
    assert metrics.spearmanr(np.exp(predictions), labels**3) == pytest.approx(value, abs=1e-12)
    assert metrics.spearmanr(-predictions, labels) == pytest.approx(-value, abs=1e-12)


@given(SCORES, st.floats(0.01, 100), st.floats(-100, 100))
def test_pearson_ignores_scale_and_shift(pair, scale, shift):
    predictions, labels = pair
    value = metrics.pearson(predictions, labels)
    assert metrics.pearson(scale * predictions + shift, labels) == pytest.approx(value, abs=1e-6)
    assert metrics.pearson(labels, predictions) == pytest.approx(value, abs=1e-12)


@settings(max_examples=40)
@given(CLASSES)
def test_matthews_is_symmetric_and_f1_is_not(pair):
    predictions, labels = pair
    value = metrics.matthews_correlation(predictions, labels)
    assert metrics.matthews_correlation(1 - predictions, 1 - labels) == pytest.approx(value, abs=1e-12)
    assert metrics.matthews_correlation(labels, predictions) == pytest.approx(value, abs=1e-12)
    assert metrics.matthews_correlation(1 - predictions, labels) == pytest.approx(-value, abs=1e-12)
    assert metrics.f1(labels, predictions) == pytest.approx(metrics.f1(predictions, labels))


def test_f1_is_of_class_one():
    labels, predictions = np.array([1, 1, 1, 0]), np.array([1, 1, 0, 0])
    assert metrics.f1(predictions, labels) == pytest.approx(0.8)  # precision 1, recall 2/3
    assert metrics.f1(1 - predictions, 1 - labels) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"classes 0 and 1, the labels hold \[0 1 2\]"):
        metrics.f1(np.array([0, 1, 1]), np.array([0, 1, 2]))


# The F1 of a class is 2 · hits / (predicted + true).
@pytest.mark.parametrize(
    ("labels", "predictions", "macro", "micro"),
    [
        ([0, 0, 1, 2], [0, 1, 1, 2], (2 / 3 + 2 / 3 + 1) / 3, 3 / 4),
        ([0, 0, 0, 0], [0, 0, 0, 0], 1.0, 1.0),  # classes that occur on neither side are left out
        ([0, 0, 0, 0], [0, 0, 0, 2], (6 / 7 + 0) / 2, 3 / 4),  # class 2 is predicted and never true: its F1 is 0
        ([0, 0, 2, 0], [0, 0, 0, 0], (6 / 7 + 0) / 2, 3 / 4),  # class 2 is true and never predicted
        ([0, 1], [1, 0], 0.0, 0.0),
        ([5, 5, 7], [5, 7, 7], (2 / 3 + 2 / 3) / 2, 2 / 3),
    ],
)
def test_macro_and_micro_f1_by_hand(labels, predictions, macro, micro):
    labels, predictions = np.array(labels), np.array(predictions)
    assert metrics.macro_f1(predictions, labels) == pytest.approx(macro)
    assert metrics.micro_f1(predictions, labels) == pytest.approx(micro)


@given(LENGTHS.flatmap(lambda n: hnp.arrays(np.int64, (2, n), elements=st.integers(0, 4))))
def test_macro_f1_counts_hits_of_each_class_and_micro_f1_is_the_accuracy(pair):
    predictions, labels = pair
    scores = [
        2 * ((predictions == c) & (labels == c)).sum() / ((predictions == c).sum() + (labels == c).sum())
        for c in np.unique(pair)
    ]
    assert metrics.macro_f1(predictions, labels) == pytest.approx(np.mean(scores))
    assert metrics.micro_f1(predictions, labels) == pytest.approx(metrics.accuracy(predictions, labels))
    order = np.array([3, 0, 4, 1, 2])
    assert metrics.macro_f1(order[predictions], order[labels]) == pytest.approx(np.mean(scores)), "no class is special"


def test_names_of_metrics_are_checked():
    metrics.check(("macro_f1", "micro_f1", "accuracy"), False)
    metrics.check(("pearson",), True)
    for names, regression, message in (
        (("macro",), False, "did you mean 'macro_f1'"),
        (("spearman",), True, "did you mean 'spearmanr'"),
        (("pearson",), False, "does not exist for classes: expected one of accuracy"),
        (("macro_f1",), True, "does not exist for scores: expected one of pearson"),
        ((), False, "no metrics are given"),
        (("f1", "f1"), False, "'f1' is given twice"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.check(names, regression)


@pytest.mark.parametrize("constant", [0, 1])
def test_constant_class_predictions_have_a_defined_result(constant):
    labels, predictions = np.array([0, 1, 1, 0]), np.full(4, constant)
    assert metrics.matthews_correlation(predictions, labels) == 0.0
    assert metrics.matthews_correlation(labels, predictions) == 0.0
    assert metrics.matthews_correlation(predictions, predictions) == 0.0
    assert metrics.f1(predictions, labels) == pytest.approx(2 / 3 * constant)
    assert metrics.f1(np.zeros(4, int), np.zeros(4, int)) == 0.0


@pytest.mark.parametrize("value", [0.0, 0.1, 2.5, -1e300, 1e-300, 5e-324])
@pytest.mark.parametrize("metric", [metrics.pearson, metrics.spearmanr])
def test_constant_scores_correlate_with_nothing(metric, value):
    constant, varied = np.full(7, value), np.arange(7.0)
    assert metric(constant, varied) == metric(varied, constant) == metric(constant, constant) == 0.0


def test_extreme_scores_do_not_overflow_or_warn():
    small = np.arange(5.0)
    for scale in (1e-320, 1e-200, 1e200, 1e307):
        assert metrics.pearson(small * scale, small) == pytest.approx(1.0, abs=1e-3)
    nearly_constant = 1.0 + np.array([0, 1, 2, 1, 0]) * np.finfo(float).eps
    assert metrics.pearson(nearly_constant, small) == 0.0
    assert metrics.pearson(small[:2], small[:2]) == pytest.approx(1.0)
    assert metrics.spearmanr(small[:2], -small[:2]) == pytest.approx(-1.0)
    assert metrics.pearson(small[:1], small[:1]) == metrics.spearmanr(small[:1], small[:1]) == 0.0


def test_float32_scores_are_measured_in_float64():
    generator = np.random.default_rng(0)
    scores = (1000 + generator.random(5000)).astype(np.float32)
    labels = scores.astype(np.float64) + generator.normal(size=5000)
    assert metrics.pearson(scores, labels) == pytest.approx(stats.pearsonr(scores.astype(float), labels)[0], abs=1e-12)


ALL = [*metrics.CLASSIFICATION.values(), *metrics.REGRESSION.values()]


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.usefixtures("unchecked")
def test_unusable_input_is_refused(metric):
    two = np.array([0, 1])
    with pytest.raises(ValueError, match=r"one length, got shapes \(2,\) and \(3,\)"):
        metric(two, np.array([0, 1, 1]))
    with pytest.raises(ValueError, match="one length"):
        metric(np.zeros((2, 1)), two)
    with pytest.raises(ValueError, match="got 0 samples"):
        metric(two[:0], two[:0])
    with pytest.raises(ValueError, match="prediction 1 is nan"):
        metric(np.array([0, np.nan]), two)
    with pytest.raises(ValueError, match="label 0 is inf"):
        metric(two, np.array([np.inf, 1]))


def test_compute_takes_logits_or_one_column_of_scores():
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [5.0, -1.0], [0.0, 1.0]])
    found = metrics.compute(("f1", "accuracy", "matthews_correlation"), logits, np.array([0, 1, 1, 1]))
    assert found == pytest.approx({"f1": 0.8, "accuracy": 0.75, "matthews_correlation": 3**-0.5})
    assert list(found) == ["f1", "accuracy", "matthews_correlation"]
    assert all(type(value) is float for value in found.values())
    scores = np.array([[0.1], [2.0], [1.0]], dtype=np.float32)
    assert metrics.compute(("pearson", "spearmanr"), scores, np.array([0.0, 5.0, 1.0]))["spearmanr"] == 1.0


@pytest.mark.parametrize(
    ("names", "outputs", "labels", "message"),
    [
        (["acuracy"], np.zeros((2, 2)), [0, 1], "'acuracy' does not exist.*did you mean 'accuracy'"),
        (["pearson"], np.zeros((2, 3)), [0, 1], "'pearson' does not exist for classes.*one of accuracy"),
        (["accuracy"], np.zeros((2, 1)), [0, 1], "expected one of pearson, spearmanr"),
        (["accuracy"], np.array([[0, 1], [np.nan, 0]]), [0, 1], r"outputs of sample 1 are \[nan  0.\].*diverged"),
        (["pearson"], np.array([[0], [np.inf]]), [0, 1], "sample 1"),
        (["accuracy"], np.zeros((2, 2)), [0, -1], "label -1 of sample 1.*hidden"),
        (["accuracy"], np.zeros((2, 2)), [2, 0], "label 2 of sample 0 is none of the 2 classes"),
        (["accuracy"], np.zeros(2), [0, 1], r"expected outputs \(samples, outputs\).*\(2,\)"),
        (["accuracy"], np.zeros((3, 2)), [0, 1], r"as many labels, got \(3, 2\), \(2,\)"),
        (["accuracy"], np.zeros((0, 2)), [], "got 0 samples"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_compute_refuses(names, outputs, labels, message):
    with pytest.raises(ValueError, match=message):
        metrics.compute(names, outputs, np.array(labels))
