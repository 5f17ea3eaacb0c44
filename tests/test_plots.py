import matplotlib

matplotlib.use("Agg")

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest

from kdlib import plots


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
