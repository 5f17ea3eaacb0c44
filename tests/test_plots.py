import matplotlib

matplotlib.use("Agg")

import io
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest

from kdlib import compare, plots


@pytest.fixture
def axes():
    with plt.rc_context():
        plots.use_style()
        figure, axes = plt.subplots()
        yield axes
        plt.close(figure)


def test_a_figure_in_the_books_style_is_small(axes):
    generator = np.random.default_rng(0)
    for name in ("teacher", "student", "distilled"):
        plots.band(axes, np.arange(30), generator.normal(size=(5, 30)).cumsum(axis=1), label=name)
    axes.set(xlabel="step", ylabel="loss (nats)", title="a crowded figure")
    axes.legend()
    file = io.BytesIO()
    axes.figure.savefig(file, format="png")
    assert tuple(axes.figure.get_size_inches()) == (4.2, 2.8)
    assert len(file.getvalue()) < 60_000


def test_colours_differ_in_brightness_or_hue_for_colour_blind_readers(axes):
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    okabe_ito = {"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"}
    assert {matplotlib.colors.to_hex(colour) for colour in colours} == okabe_ito


def test_band_draws_mean_and_one_sample_deviation(axes):
    line = plots.band(axes, [0, 1], [[1.0, 4.0], [3.0, 8.0]], label="two seeds")
    np.testing.assert_allclose(line.get_ydata(), [2.0, 6.0])
    vertices = axes.collections[0].get_paths()[0].vertices
    at_one = vertices[vertices[:, 0] == 1][:, 1]
    np.testing.assert_allclose([at_one.min(), at_one.max()], [6 - 8**0.5, 6 + 8**0.5])  # n − 1, not n
    assert line.get_label() == "two seeds"
    assert matplotlib.colors.same_color(axes.collections[0].get_facecolor()[0, :3], line.get_color())


def test_band_of_a_single_seed_is_a_line(axes):
    plots.band(axes, [0, 1, 2], [[1.0, 2.0, 3.0]])
    assert len(axes.lines) == 1
    assert not axes.collections


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], r"shape \(2,\)"),
        ([[1.0, 2.0, 3.0]], r"expected \(seeds, 2\)"),
        (np.empty((0, 2)), r"shape \(0, 2\)"),
        ([[1.0, float("nan")]], "NaN"),
    ],
)
def test_band_refuses_what_it_cannot_draw(axes, values, message):
    with pytest.raises(ValueError, match=message):
        plots.band(axes, [0, 1], values)


def rows_of(ends):
    """Differences by name whose 95 % intervals have these ends."""
    reach = compare.Difference(mean=0.0, error=1.0, freedom=9, seeds=10).half_width
    return {
        name: compare.Difference(mean=(low + high) / 2, error=(high - low) / 2 / reach, freedom=9, seeds=10)
        for name, (low, high) in ends.items()
    }


ENDS = {"LGTM": (0.2, 1.0), "KD for $5": (-0.9, -0.6), "IKD": (-0.1, 0.3), "DML": (-1.0, 0.8)}


def drawn(axes):
    """The rows of a forest plot by their place from the top: name, ends, mean, marker."""
    axes.figure.canvas.draw()
    names = [label.get_text() for label in axes.get_yticklabels()]
    spans = {
        line.get_ydata()[0]: line.get_xdata()
        for line in axes.lines
        if len(set(line.get_ydata())) == 1 < len(line.get_xdata())
    }
    dots = {line.get_ydata()[0]: line for line in axes.lines if len(line.get_xdata()) == 1}
    return [(name, *spans[n], dots[n].get_xdata()[0], dots[n].get_marker()) for n, name in enumerate(names)]


def test_a_forest_plot_shows_names_intervals_means_and_verdicts_from_the_top(axes):
    plots.forest(axes, rows_of(ENDS), margin=0.5)
    wanted = [(plots.plain(name), *ends, sum(ends) / 2) for name, ends in ENDS.items()]
    for found, row in zip(drawn(axes), wanted, strict=True):
        assert found[0] == row[0] and found[1:4] == pytest.approx(row[1:])
    assert [row[-1] for row in drawn(axes)] == [plots.MARKS[w]["marker"] for w in ("better", "worse", "equal", "open")]
    assert axes.yaxis_inverted()
    band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert (band.x0, band.x1) == pytest.approx((-0.5, 0.5))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["better", "worse", "equal", "open"]


def test_a_forest_plot_can_take_the_verdicts_of_a_family_and_losses(axes):
    verdicts = {**dict.fromkeys(ENDS, "open"), "DML": "worse"}
    plots.forest(axes, rows_of(ENDS), 0.5, verdicts)
    assert [row[-1] for row in drawn(axes)] == ["o", "o", "o", "v"]
    axes.clear()
    plots.forest(axes, rows_of(ENDS), 0.5, lower_is_better=True)
    assert [row[-1] for row in drawn(axes)] == ["v", "^", "s", "o"]


def test_verdicts_differ_in_shape_and_in_the_colours_of_the_style():
    assert len({look["marker"] for look in plots.MARKS.values()}) == 4
    with plt.rc_context():
        plots.use_style()
        colours = {matplotlib.colors.to_hex(colour) for colour in plt.rcParams["axes.prop_cycle"].by_key()["color"]}
    assert {look["color"].lower() for look in plots.MARKS.values()} <= colours and len(plots.MARKS) == 4


@pytest.mark.parametrize("count", [3, 20])
def test_few_rows_and_many_can_be_read(count):
    """Names and legend stand within the figure, and no two names touch."""
    with plt.rc_context():
        plots.use_style()
        figure, axes = plt.subplots(figsize=(4.2, 0.8 + 0.19 * count))
        ends = {f"with pilot update over without, {n}": [*ENDS.values()][n % 4] for n in range(count)}
        plots.forest(axes, rows_of(ends), 0.5)
        axes.set_xlabel("gain (points)")
        figure.canvas.draw()
        boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
        assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(boxes))
        for box in (*boxes, axes.get_legend().get_window_extent(), axes.xaxis.label.get_window_extent()):
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
        plt.close(figure)


def test_a_forest_plot_refuses_what_it_cannot_draw(axes):
    with pytest.raises(ValueError, match="no rows"):
        plots.forest(axes, {}, 0.5)
    with pytest.raises(ValueError, match="nothing can be drawn of DML: give rows, and verdicts for all"):
        plots.forest(axes, rows_of(ENDS), 0.5, dict.fromkeys(["LGTM", "KD for $5", "IKD"], "open"))
