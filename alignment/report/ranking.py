"""The ranking of a sensitivity sweep as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignment.errors import AlignError
from alignment.quantize.sensitivity import METRICS, Sensitivity
from alignment.storage import writing

#: Bars that can be told apart.
MOST = 40


def draw_ranking(found: Sensitivity, metric: str, path: Path) -> None:
    """Writes an SVG: a bar a layer, the most sensitive on top, darker with its share of multiplications.

    A line marks all of int8, that the bars of `leave-one-out` start from.

    Raises:
        AlignError: for a metric that the sweep does not have, and where matplotlib is missing.
    """
    ranking = found.ranking(metric)[:MOST]
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise AlignError("--plot: matplotlib is not installed", "pip install matplotlib") from None
    layers = {layer.node: layer for layer in found.layers}
    most = max(layer.macs for layer in found.layers) or 1
    # The same numbers make the same file; names are no formulas.
    style: Any = {"svg.hashsalt": "alignment", "svg.fonttype": "none", "font.size": 8, "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 1 + 0.22 * len(ranking)), layout="constrained")
        axes = figure.add_subplot()
        shades = [matplotlib.colormaps["Blues"](0.3 + 0.7 * layers[node].macs / most) for node in ranking]
        labels = [layers[node].module or node for node in ranking]
        axes.barh(range(len(ranking)), [layers[node].metrics[metric] for node in ranking], color=shades)
        axes.set_yticks(range(len(ranking)), labels)
        axes.set_ylim(len(ranking) - 0.4, -0.6)
        axes.set_xlabel(f"{metric}: {METRICS[metric].what}; darker: more multiplications")
        axes.set_title(f"{found.variant}: {found.mode}, {found.part}, {found.images} images")
        if found.mode == "leave-one-out" and metric in found.baseline:
            axes.axvline(found.baseline[metric], color="black", linewidth=0.8)
        with writing(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
