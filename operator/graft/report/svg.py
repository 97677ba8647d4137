"""Convert a matplotlib figure to an SVG element of the page: no script, no font file, no link, colours for light and
dark pages."""

import hashlib
import io
import re
from html import escape
from typing import Any

import matplotlib as mpl
from cycler import cycler
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Distinguishable with the common colour blindnesses, on white and on near-black (contrast at least 3:1 on both).
COLOURS = ("#3d85c6", "#d9730d", "#2f9e6e", "#a56cc1", "#c9487a", "#8a8d91", "#b08d00", "#20a0a8", "#7f7fd5", "#d6604d")
INK = "#010203"  # placeholder for the page's text colour until the figure is written
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of suites and modules are not formulas
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.prop_cycle": cycler(color=COLOURS),
}
IDENTIFIER = re.compile(r'\bid="([^"]+)"')
REFERENCE = re.compile(r'(url\(#|href="#)([^")]+)')


def new_figure(columns: int = 1, height: float = 2.9, width: float = 7.4) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes, side by side.

    Sizes are in inches; the page scales the figure to the column's width.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


def inline(figure: Figure, title: str) -> Markup:
    """Return the SVG element. A screen reader reads `title` instead of the figure."""
    buffer = io.StringIO()
    digest = hashlib.sha256(title.encode()).hexdigest()[:8]
    with mpl.rc_context(STYLE | {"svg.hashsalt": digest}):
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = _page_wide_identifiers(text, digest).replace(INK, "currentColor")
    opening = text[: text.index(">") + 1]
    view = re.findall(r'viewBox="([^"]+)"', opening)
    start = (
        f'<svg viewBox="{view[0]}" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{escape(title)}">'
    )
    return Markup(start + text[len(opening) :].strip())  # noqa: S704 - matplotlib escapes the texts of a figure


def _page_wide_identifiers(text: str, prefix: str) -> str:
    """Make ids unique on the page, because every matplotlib figure counts its parts from 1.

    Remove ids without a reference.
    """
    used = {name for _, name in REFERENCE.findall(text)}

    def identifier(match: re.Match[str]) -> str:
        return f'id="{prefix}-{match[1]}"' if match[1] in used else ""

    text = IDENTIFIER.sub(identifier, text)
    return REFERENCE.sub(lambda match: f"{match[1]}{prefix}-{match[2]}", text)
