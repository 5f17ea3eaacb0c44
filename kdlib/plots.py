"""The look of the book's figures, and the one kind of plot that matplotlib lacks: a mean with its spread over seeds."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

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
