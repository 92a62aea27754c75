"""Pictures of a spectrum: what is on the axes, in either library."""

from __future__ import annotations

import sys

import pytest

from compressm.cutting.plots import COLOURS, plot_discarded
from compressm.errors import MissingExtraError

SHARES = {f"layer <{index}>": [0.5, 0.01 / (index + 1), 0.0] for index in range(10)}
TITLES = ("Energy beyond the first r states", "states kept, r", "share of the Hankel energy discarded")


def test_by_plotly() -> None:
    pytest.importorskip("plotly")
    figure = plot_discarded(SHARES, "plotly")
    assert len(figure.data) == 10
    for index, trace in enumerate(figure.data):
        assert trace.name == f"layer &lt;{index}&gt;"  # plotly reads names as HTML
        assert list(trace.x) == [1, 2, 3]
        assert list(trace.y) == [0.5, 0.01 / (index + 1), 1e-8]  # a logarithmic axis has no zero
        assert trace.line.color == COLOURS[index % 8]
    layout = figure.layout
    assert (layout.title.text, layout.xaxis.title.text, layout.yaxis.title.text) == TITLES
    assert layout.yaxis.type == "log"


@pytest.mark.parametrize("count", [10, 12, 13])
def test_by_matplotlib(count: int) -> None:
    pytest.importorskip("matplotlib")
    shares = {f"layer <{index}>": [0.5, 0.01 / (index + 1), 0.0] for index in range(count)}
    (axis,) = plot_discarded(shares, "matplotlib").axes
    lines, levels = axis.lines[:count], axis.lines[count:]
    for index, line in enumerate(lines):
        assert line.get_label() == f"layer <{index}>"
        assert list(line.get_xdata()) == [1, 2, 3]
        assert list(line.get_ydata()) == [0.5, 0.01 / (index + 1), 1e-8]
        assert line.get_color() == COLOURS[index % 8]
    assert [line.get_ydata()[0] for line in levels] == [0.1, 0.01, 0.001]
    assert (axis.get_title(), axis.get_xlabel(), axis.get_ylabel()) == TITLES
    assert (axis.get_yscale(), axis.get_xscale(), axis.get_xlim()[0]) == ("log", "linear", 0)
    assert not axis.spines["top"].get_visible()
    assert not axis.spines["right"].get_visible()
    legend = axis.get_legend()
    assert (legend is None) == (count > 12)  # it would cover the lines
    if legend is not None:
        assert [text.get_text() for text in legend.get_texts()] == list(shares)


def test_plotly_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    assert type(plot_discarded(SHARES)).__module__.startswith("plotly")
    hidden = {"plotly": None, "plotly.graph_objects": None}  # as an import of what is not there
    for name, value in hidden.items():
        monkeypatch.setitem(sys.modules, name, value)
    assert type(plot_discarded(SHARES)).__module__.startswith("matplotlib")
    with pytest.raises(MissingExtraError, match=r'plotly: pip install "compressm\[train\]"'):
        plot_discarded(SHARES, "plotly")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r'matplotlib: pip install "compressm\[train\]"'):
        plot_discarded(SHARES)


def test_other_libraries_are_refused() -> None:
    with pytest.raises(ValueError, match="'plotly' or 'matplotlib'; got 'gnuplot'"):
        plot_discarded(SHARES, "gnuplot")  # type: ignore[arg-type]
