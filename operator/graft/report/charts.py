"""The figures of the pages. Each takes plain numbers, so that the page of a run and the comparison share them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from graft.report.svg import COLOURS, INK, STYLE, inline, new_figure

Points = Sequence[tuple[float, float]]
DASHED = (0, (4, 2))
CELLS_WITH_TEXT = 14  # up to this number of columns, the cells of a heat map show their numbers


def lines(
    series: Mapping[str, Points],
    *,
    title: str,
    x: str,
    y: str,
    dashed: Sequence[str] = (),
    colours: Mapping[str, str] | None = None,
    top: float | None = None,
    log: bool = False,
) -> Markup:
    """Draw lines over an integer x.

    Without `colours`, colours follow the order of the names. `top` is the upper end of the y scale. If `colours` is
    given, dashed lines have no entry in the legend, because another line has their colour.
    """
    with mpl.rc_context(STYLE):
        figure, (axes,) = new_figure()
        for name, points in series.items():
            given: dict[str, Any] = {"color": colours[name]} if colours else {}
            axes.plot(
                [at for at, _ in points],
                [value for _, value in points],
                label=f"_{name}" if colours and name in dashed else name,
                linestyle=DASHED if name in dashed else "solid",
                marker="o" if len(points) <= 40 else None,
                markersize=3.5,
                **given,
            )
        axes.set(xlabel=x, ylabel=y)
        if log:
            _logarithmic(axes)
        if top is not None:
            lowest = min(value for points in series.values() for _, value in points)
            axes.set_ylim(lowest - 0.08 * (top - lowest) - 1e-3, top + 0.04 * (top - lowest) + 1e-3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(axes.get_legend_handles_labels()[1]) > 1:
            _legend(axes, len(series))
        return inline(figure, title)


def panels(series: Mapping[str, Points], *, title: str, x: str) -> Markup:
    """Draw lines side by side, each over an integer x and with a scale of its own. The name of a line is its title."""
    with mpl.rc_context(STYLE):
        figure, columns = new_figure(len(series), height=2.2)
        for number, (axes, (name, points)) in enumerate(zip(columns, series.items(), strict=True)):
            axes.plot(
                [at for at, _ in points],
                [value for _, value in points],
                color=COLOURS[number],
                marker="o" if len(points) <= 40 else None,
                markersize=3,
            )
            axes.set(xlabel=x, title=name)
            axes.set_ylim(bottom=0)
            axes.ticklabel_format(axis="y", scilimits=(-3, 4))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return inline(figure, title)


def bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    title: str,
    x: str,
    share: bool = False,
    words: Callable[[float], str] = "{:.3g}".format,
    colours: Mapping[str, str] | None = None,
    log: bool = False,
    intervals: Mapping[str, Sequence[tuple[float, float] | None]] | None = None,
) -> Markup:
    """Draw horizontal bars: one group per name, and in it one bar per series.

    `words` formats the value at its end. None: no bar. `intervals`: from where to where a line over each bar goes.
    """
    with mpl.rc_context(STYLE):
        thickness = 0.8 / len(series)
        height = 0.24 * len(groups) * (len(series) + 0.8)
        figure, (axes,) = new_figure(height=0.95 + height)
        largest = max((value for values in series.values() for value in values if value is not None), default=1)
        there = [[name for name, values in series.items() if values[index] is not None] for index in range(len(groups))]
        for number, (name, values) in enumerate(series.items()):
            known = {
                index + (there[index].index(name) - (len(there[index]) - 1) / 2) * thickness: value
                for index, value in enumerate(values)
                if value is not None
            }
            colour = colours[name] if colours else COLOURS[number % len(COLOURS)]
            axes.barh(list(known), list(known.values()), thickness * 0.88, label=name, color=colour)
            ends = (intervals or {}).get(name) or [None] * len(values)
            over = [end for end, value in zip(ends, values, strict=True) if value is not None]
            for (place, value), end in zip(known.items(), over, strict=True):
                if end is not None:
                    axes.plot(end, (place, place), color=INK, linewidth=1, marker="|", markersize=5)
                    largest = max(largest, end[1])
                text = f"{100 * value:.1f} %" if share else words(value)
                right = max(value, end[1]) if end is not None else value
                axes.annotate(text, (right, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(range(len(groups)), groups)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlim(0, 1.13 if share else (largest or 1) * 1.15)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(x)
        if log:
            least = min(value for values in series.values() for value in values if value)
            axes.set_xscale("log")
            axes.set_xlim(least / 2, largest * 3)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        if share:
            axes.xaxis.set_major_formatter(PercentFormatter(1))
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        if len(series) > 1:
            _legend(axes, len(series))
        return inline(figure, title)


def spectra(normalised: Mapping[str, Sequence[float]], energy: Mapping[str, Sequence[float]], *, title: str) -> Markup:
    """Draw left the singular values divided by the largest, right the share of the squared norm that a smaller rank
    keeps."""
    with mpl.rc_context(STYLE):
        figure, (left, right) = new_figure(2, height=3.3)
        for name, values in normalised.items():
            left.plot(range(1, len(values) + 1), [value or math.nan for value in values], label=name, **_dots(values))
        _logarithmic(left)
        low = min((value for values in normalised.values() for value in values if value > 1e-6), default=0.1)
        left.set(xlabel="index of the singular value", title="Singular values divided by the largest")
        left.set_ylim(max(low / 1.5, 1e-6), 1.3)
        for name, shares in energy.items():
            right.plot(range(1, len(shares) + 1), shares, label=name, **_dots(shares))
        right.axhline(0.9, color=INK, linewidth=0.8, linestyle=DASHED)
        right.set(xlabel="rank", title="Squared norm that a rank keeps")
        right.yaxis.set_major_formatter(PercentFormatter(1))
        right.set_ylim(0, 1.03)
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)))
        return inline(figure, title)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[int],
    cells: Mapping[tuple[str, int], float],
    *,
    title: str,
    label: str,
    form: str,
    largest: float | None = None,
) -> Markup:
    """Draw one row per kind of matrix and one column per layer. A cell without a value is empty."""
    with mpl.rc_context(STYLE):
        figure, (axes,) = new_figure(height=1.0 + 0.27 * len(rows))
        grid = [[cells.get((row, column), math.nan) for column in columns] for row in rows]
        top = largest or max(cells.values(), default=1) or 1
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
        bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.015)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=9)
        axes.set_yticks(range(len(rows)), rows)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True, steps=[1, 2, 5, 10]))
        if len(columns) <= CELLS_WITH_TEXT:
            axes.set_xticks(range(len(columns)), [str(column) for column in columns])
            for y, values in enumerate(grid):
                for x, value in enumerate(values):
                    if not math.isnan(value):
                        colour = "black" if value > 0.55 * top else "white"
                        axes.text(x, y, form.format(value), ha="center", va="center", color=colour, fontsize=9)
        axes.set(xlabel="layer", title=label)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return inline(figure, title)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _dots(values: Sequence[float]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3} if len(values) <= 32 else {}


def _legend(axes: Axes, count: int) -> None:
    axes.figure.legend(loc="outside upper left", ncols=min(count, 4))
