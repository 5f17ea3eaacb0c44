"""The look of the book's figures, and what matplotlib lacks: a mean with its spread over seeds, and a forest plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from kdlib.compare import Difference, Verdict, verdict

_STYLE = Path(__file__).with_name("book.mplstyle")


def use_style() -> None:
    """Switch matplotlib to the book's style: 4.2 × 2.8 inches, quiet axes, colours safe for colour-blind readers."""
    plt.style.use(_STYLE)


def plain(text: str) -> str:
    """`text` as matplotlib shows it letter by letter, dollar signs too, which would begin a formula."""
    return text.replace("$", r"\$")


def band(axes: Axes, x: ArrayLike, values: ArrayLike, label: str | None = None, **style: Any) -> Line2D:
    """Draw the mean over seeds as a line and ± 1 standard deviation as a band; return the line.

    `values` has shape `(seeds, len(x))`, in the unit of the axis.  The deviation is the one of a sample (n − 1); with
    a single seed there is no spread to show and only the line is drawn.  `style` goes to `axes.plot`.

    Raises ValueError if the shapes do not fit or a value is NaN or infinite: a seed that is missing must be left out
    by the caller, who knows why.
    """
    x, values = np.asarray(x, dtype=float), np.asarray(values, dtype=float)
    if values.ndim != 2 or x.ndim != 1 or values.shape[1] != len(x) or len(values) == 0:
        raise ValueError(f"values have shape {values.shape}, x {x.shape}; expected (seeds, {len(x)}) and ({len(x)},)")
    if not np.isfinite(values).all():
        raise ValueError("values hold NaN or infinity; drop the seeds that did not finish and say so")
    mean = values.mean(axis=0)
    (line,) = axes.plot(x, mean, label=label, **style)
    if len(values) > 1:
        spread = values.std(axis=0, ddof=1)
        axes.fill_between(x, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0)
    return line


MARKS: dict[Verdict, dict[str, Any]] = {
    "better": {"marker": "^", "color": "#0072B2"},
    "worse": {"marker": "v", "color": "#D55E00"},
    "equal": {"marker": "s", "color": "#009E73"},
    "open": {"marker": "o", "color": "#000000", "markerfacecolor": "white"},
}
"""How a verdict is drawn: by its shape and, safe for colour-blind readers, by its colour."""


def forest(
    axes: Axes,
    rows: Mapping[str, Difference],
    margin: float,
    verdicts: Mapping[str, Verdict] | None = None,
    lower_is_better: bool = False,
) -> None:
    """Draw differences as a forest plot: from the top, for each row its name, mean, interval and verdict.

    The grey band is the margin within which two arms count as equal.  `verdicts` says what a family of claims says of
    the rows, see `compare.family`; without it each row is judged alone.  A figure of n rows should
    be about 0.8 + 0.19 n inches high.

    Raises ValueError without rows and for a verdict that is missing.
    """
    if not rows or (verdicts is not None and not rows.keys() <= verdicts.keys()):
        missing = ", ".join(rows.keys() - (verdicts or {}).keys()) or "no rows"
        raise ValueError(f"nothing can be drawn of {missing}: give rows, and verdicts for all of them or for none")
    axes.axvspan(-margin, margin, color="0.92", linewidth=0, zorder=0)
    axes.axvline(0, color="0.55", linewidth=0.8, zorder=0)
    used: dict[Verdict, Line2D] = {}
    for place, (name, row) in enumerate(rows.items()):
        word = verdict(row, margin, lower_is_better) if verdicts is None else verdicts[name]
        axes.plot([row.low, row.high], [place, place], color=MARKS[word]["color"], linewidth=1.2)
        (used[word],) = axes.plot(row.mean, place, linestyle="", markersize=5, label=word, **MARKS[word])
    axes.set_yticks(range(len(rows)), [plain(name) for name in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    shown = [used[word] for word in MARKS if word in used]
    beside = {"ncols": len(shown), "columnspacing": 1.0, "handletextpad": 0.1, "borderaxespad": 0.2}
    axes.legend(handles=shown, loc="lower right", bbox_to_anchor=(1, 1), **beside)
