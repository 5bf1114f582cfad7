"""Figures hold what they are given."""

import numpy as np

from training.study.fits import Estimate
from training.study.plots import Panel, Series, curves_figure, dots_figure, short


def point(value: float) -> Estimate:
    return Estimate(value, value * 0.9, value * 1.1)


def test_every_dot_lies_within_its_axes_which_begin_at_zero() -> None:
    panels = [
        Panel("linear", [Series("a", np.zeros(2), [point(0.1), point(0.2)])]),
        Panel("end-to-end", [Series("a", np.zeros(2), [point(0.7), point(0.9)])]),
    ]
    figure = dots_figure(panels, ["one", "two"], "error")
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert low == 0
        assert high > 0.99
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["one", "two"]


def test_a_point_without_an_interval_is_drawn_without_a_bar() -> None:
    nothing = Estimate(2.0, float("nan"), float("nan"))
    series = Series("a", np.array([100.0, 1000.0]), [nothing, point(1.0)])
    figure = curves_figure([Panel("", [series])], "galaxies", "loss", joined=False)
    bars = figure.axes[0].containers[0].lines[2][0].get_segments()
    assert [float(np.ptp(bar[:, 1])) for bar in bars] == [0.0, float(np.ptp([0.9, 1.1]))]


def test_many_panels_stand_four_to_a_row() -> None:
    series = Series("a", np.array([1.0, 2.0]), [point(2.0), point(1.0)])
    figure = curves_figure([Panel(str(i), [series]) for i in range(10)], "x", "y", joined=True)
    assert len(figure.axes) == 10
    assert figure.axes[0].get_gridspec().get_geometry() == (3, 4)


def test_counts_are_written_as_people_do() -> None:
    assert [short(number) for number in (16, 250, 1500, 28_600_000)] == ["16", "250", "1.5k", "28.6M"]
