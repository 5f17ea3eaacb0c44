"""Draw the figure on the site's first page: `python -m tools.idea` writes docs/_static/idea.svg."""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from kdlib import plots
from tools.chapters import ROOT

TARGET = Path("docs") / "_static" / "idea.svg"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"


def box(axes: Axes, x: float, y: float, text: str, color: str, width: float = 1.25, height: float = 0.5) -> None:
    """A rounded box around two lines of text, centred at (x, y)."""
    place = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(place, width, height, "round,pad=0,rounding_size=0.08", fc=color + "18", ec=color, lw=1.2)
    )
    axes.text(x, y, text, ha="center", va="center", linespacing=1.35)


def arrow(axes: Axes, start: tuple, end: tuple, color: str = GREY, bend: str = "arc3") -> None:
    """An arrow between two points."""
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=10,
            color=color,
            lw=1.3,
            connectionstyle=bend,
            shrinkA=0,
            shrinkB=0,
        )
    )


def draw() -> plt.Figure:
    """Teacher, student, feedback batch, tangent, influence, and the three ways back to the teacher."""
    figure = plt.figure(figsize=(4.4, 4.5), layout="none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 4.4), ylim=(0, 4.5))
    axes.axis("off")
    note = {"ha": "center", "va": "center", "color": GREY, "fontsize": 8}

    box(axes, 0.85, 4.1, "teacher\n$\\theta_t$", BLUE, 1.1)
    box(axes, 3.4, 4.1, "student\n$\\theta_s$", ORANGE, 1.1)
    arrow(axes, (1.42, 4.1), (2.83, 4.1), BLUE)
    axes.text(2.12, 4.24, "soft targets $p^t$", **note)

    arrow(axes, (3.4, 3.83), (3.4, 3.52), ORANGE)
    axes.text(2.78, 3.68, "a step on trial", **note)
    box(axes, 3.4, 3.25, "pilot student\n$\\theta_s^\\prime$", ORANGE, 1.5)
    box(axes, 3.4, 2.42, "feedback batch\n$g = \\nabla L_{CE}(e;\\theta_s^\\prime)$", GREEN, 1.7)
    arrow(axes, (3.4, 2.98), (3.4, 2.69), ORANGE)
    axes.text(2.86, 2.84, "is judged", **note)

    arrow(axes, (3.4, 2.15), (3.4, 1.84), GREEN)
    axes.text(2.68, 2.0, "along $g$", **note)
    box(
        axes,
        2.75,
        1.57,
        "student tangent $\\dot z$, hence the influence\n$I_i=\\langle\\nabla\\ell_i,g\\rangle$ of every sample",
        GREEN,
        2.95,
    )

    for x, (paper, use) in zip(
        (0.8, 2.2, 3.6),
        (
            ("LGTM", "weights sample $i$\nby $I_i$"),
            ("MetaDistil", "moves $\\theta_t$ along\n$\\nabla_{\\theta_t}$ mean $I_i$"),
            ("IKD", "asks what each\ntarget $p^t_{ic}$ did"),
        ),
        strict=True,
    ):
        axes.text(x, 0.83, paper, ha="center", va="center", weight="bold", color=BLUE)
        axes.text(x, 0.5, use, ha="center", va="center", linespacing=1.35, fontsize=8)
        axes.add_patch(
            FancyBboxPatch((x - 0.65, 0.27), 1.3, 0.72, "round,pad=0,rounding_size=0.08", fc="none", ec=BLUE, lw=1.2)
        )
        arrow(axes, (max(x, 1.45), 1.3), (x, 1.0), GREEN)

    # Back to the teacher, around the left side.
    for x in (0.8, 2.2, 3.6):
        axes.plot([x, x], [0.27, 0.12], color=BLUE, lw=1.3)
    axes.plot([3.6, 0.08, 0.08], [0.12, 0.12, 4.1], color=BLUE, lw=1.3)
    arrow(axes, (0.08, 4.1), (0.3, 4.1), BLUE)
    axes.text(0.2, 2.5, "the teacher changes", rotation=90, **note)
    return figure


def main(root: Path = ROOT) -> None:
    """Write the figure; the same bytes every time."""
    with mpl.rc_context():
        plots.use_style()
        mpl.rcParams.update({"svg.hashsalt": "kdlib", "mathtext.fontset": "dejavusans"})
        figure = draw()
        figure.savefig(root / TARGET, metadata={"Date": None, "Creator": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
