"""GLUE's metrics over a whole split, named as GLUE names them.

scikit-learn and scipy do the arithmetic beyond accuracy, and only functions that need them import them: a second that a
run on most tasks does without.  What they leave undefined is defined here, so that the first evaluation of an untrained
student is a number and not a NaN: a correlation with something constant is 0.0, F1 without any true or predicted
positive is 0.0, Matthews correlation with a single class on either side is 0.0.

Beside GLUE's there are micro and macro F1, which data sets with more than two classes are measured by.
"""

import difflib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped


def accuracy(predictions: Int[np.ndarray, "samples"], labels: Int[np.ndarray, "samples"]) -> float:
    """Share of predictions that equal their label, in [0, 1].

    Raises ValueError for arrays that are empty, differ in length or hold NaN; so do all functions here.
    """
    predictions, labels = _checked(predictions, labels)
    return float((predictions == labels).mean())


def f1(predictions: Int[np.ndarray, "samples"], labels: Int[np.ndarray, "samples"]) -> float:
    """F1 of the positive class, which is label 1 as in GLUE's MRPC and QQP; in [0, 1].

    Raises ValueError for a class other than 0 and 1.
    """
    from sklearn.metrics import f1_score

    predictions, labels = _checked(predictions, labels)
    for what, values in (("predictions", predictions), ("labels", labels)):
        if not np.isin(values, (0, 1)).all():
            raise ValueError(f"F1 is defined for classes 0 and 1, the {what} hold {np.unique(values)}: use 'macro_f1'")
    return float(f1_score(labels, predictions, zero_division=0.0))


def micro_f1(predictions: Int[np.ndarray, "samples"], labels: Int[np.ndarray, "samples"]) -> float:
    """F1 of the hits, misses and false alarms of all classes together, in [0, 1].

    Where each sample has one class, as here, every false alarm is a miss of another class, and this is the accuracy.
    Raises ValueError as `accuracy` does.
    """
    return accuracy(predictions, labels)


def macro_f1(predictions: Int[np.ndarray, "samples"], labels: Int[np.ndarray, "samples"]) -> float:
    """Mean of the classes' F1, each class counted alike, in [0, 1].

    The classes are those that occur among the labels or the predictions of the split; the F1 of one that is never hit
    is 0.0, and one that occurs on neither side is left out.  Raises ValueError as `accuracy` does.
    """
    from sklearn.metrics import f1_score

    predictions, labels = _checked(predictions, labels)
    return float(f1_score(labels, predictions, average="macro", zero_division=0.0))


def matthews_correlation(predictions: Int[np.ndarray, "samples"], labels: Int[np.ndarray, "samples"]) -> float:
    """Matthews correlation of two labellings, in [−1, 1]; 0.0 if either holds a single class.

    Raises ValueError as `accuracy` does.
    """
    from sklearn.metrics import matthews_corrcoef

    predictions, labels = _checked(predictions, labels)
    if _constant(predictions) or _constant(labels):
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: Float[np.ndarray, "samples"], labels: Float[np.ndarray, "samples"]) -> float:
    """Pearson correlation of scores, in [−1, 1]; 0.0 if either is constant up to rounding.

    Raises ValueError as `accuracy` does.
    """
    from scipy import stats

    predictions, labels = _centred(predictions, labels)
    if not predictions.any() or not labels.any():
        return 0.0
    return float(stats.pearsonr(predictions, labels).statistic)


def spearmanr(predictions: Float[np.ndarray, "samples"], labels: Float[np.ndarray, "samples"]) -> float:
    """Spearman rank correlation of scores, in [−1, 1], ties sharing their mean rank; 0.0 if either is constant.

    Raises ValueError as `accuracy` does.
    """
    from scipy import stats

    predictions, labels = _checked(predictions, labels)
    if _constant(predictions) or _constant(labels):
        return 0.0
    return float(stats.spearmanr(predictions, labels).statistic)


CLASSIFICATION = {
    "accuracy": accuracy,
    "f1": f1,
    "micro_f1": micro_f1,
    "macro_f1": macro_f1,
    "matthews_correlation": matthews_correlation,
}
REGRESSION = {"pearson": pearson, "spearmanr": spearmanr}


def check(names: Sequence[str], regression: bool) -> None:
    """Raise ValueError unless there are `names` and each is a metric of classes, or of scores; with the nearest."""
    known, other = (REGRESSION, CLASSIFICATION) if regression else (CLASSIFICATION, REGRESSION)
    what = "scores" if regression else "classes"
    if not names:
        raise ValueError(f"no metrics are given; expected one or more of {', '.join(known)}")
    for place, name in enumerate(names):
        if name not in known:
            near = difflib.get_close_matches(str(name), [*known, *other], n=1)
            hint = f"did you mean {near[0]!r}? " if near and near[0] != name else ""
            raise ValueError(f"metric {name!r} does not exist for {what}: {hint}expected one of {', '.join(known)}")
        if name in names[:place]:
            raise ValueError(f"metric {name!r} is given twice: give it once")


def compute(
    names: Sequence[str], outputs: Float[np.ndarray, "samples outputs"], labels: Shaped[np.ndarray, "samples"]
) -> dict[str, float]:
    """The metrics `names` of a model's outputs: logits with a column per class, or a single column of scores.

    Raises ValueError for an unknown metric, one that does not fit the number of columns, NaN or infinite outputs, and
    labels that are no class of the model, which includes the −1 of a test split whose labels are hidden.
    """
    outputs, labels = np.asarray(outputs), np.asarray(labels)
    if outputs.ndim != 2 or len(outputs) != len(labels):
        raise ValueError(f"expected outputs (samples, outputs) and as many labels, got {outputs.shape}, {labels.shape}")
    regression = outputs.shape[1] == 1
    check(names, regression)
    bad_rows = np.flatnonzero(~np.isfinite(outputs).all(axis=1))
    if bad_rows.size:
        raise ValueError(f"the outputs of sample {bad_rows[0]} are {outputs[bad_rows[0]]}: the model has diverged")
    if regression:
        predictions = outputs[:, 0]
    else:
        predictions = outputs.argmax(axis=1)
        outside = np.flatnonzero((labels < 0) | (labels >= outputs.shape[1]))
        if outside.size:
            raise ValueError(
                f"label {labels[outside[0]]} of sample {outside[0]} is none of the {outputs.shape[1]} classes; "
                "−1 marks a hidden test label, which nothing can be measured on"
            )
    return {name: (REGRESSION if regression else CLASSIFICATION)[name](predictions, labels) for name in names}


def _checked(predictions: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.ndim != 1 or predictions.shape != labels.shape:
        raise ValueError(f"expected two vectors of one length, got shapes {predictions.shape} and {labels.shape}")
    if predictions.size == 0:
        raise ValueError("a metric over an empty split is undefined; got 0 samples")
    for what, values in (("prediction", predictions), ("label", labels)):
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise ValueError(f"{what} {bad[0]} is {values[bad[0]]}; expected a finite number")
    return predictions, labels


def _constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


def _centred(*arrays: np.ndarray) -> list[np.ndarray]:
    """Float64, scaled to at most 1 and centred; all zeros where only rounding would be left to correlate."""
    centred = []
    for values in _checked(*arrays):
        values = values.astype(np.float64)
        values = values / (np.abs(values).max() or 1.0)
        values = values - values.mean()
        centred.append(values * (np.abs(values).max() > 1e-13))
    return centred
