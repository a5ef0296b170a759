"""The ladder from float to int8 as a table and as a picture."""

from __future__ import annotations

import base64
import io
from importlib.util import find_spec
from typing import Any

from alignment.results import Ladder, Rung

COLOURS = {"torch": "#b45309", "onnxruntime": "#1f6feb", "tensorrt": "#2da44e"}
MARKERS = {"torch": "s", "onnxruntime": "o", "tensorrt": "^"}


def cell(ladder: Ladder, rung: Rung, backend: str) -> str:
    """``0.6628 / +0.0015 / 0.9837``: AP, its change against FP32 on that backend, agreement."""
    return " / ".join(figures(ladder, rung, backend)) if rung.on(backend) else "-"


def figures(ladder: Ladder, rung: Rung, backend: str) -> tuple[str, str, str]:
    """AP, its change and agreement as they are shown, "-" for what is not there."""
    score, change = rung.on(backend), ladder.ap_change(rung, backend)
    return (
        f"{score.ap:.4f}" if score and score.ap >= 0 else "-",
        "-" if change is None else f"{round(change, 4) + 0.0:+.4f}",
        f"{score.agreement_ap:.4f}" if score else "-",
    )


def to_markdown(ladder: Ladder) -> str:
    """A row a rung, a column a backend."""
    head = ["rung", "nodes in float", "multiplications in int8", *ladder.backends]
    lines = [
        f"{ladder.variant}, {ladder.images} images. Cells: AP / its change against FP32 on that backend / agreement "
        f"with {ladder.reference}.",
        "",
        f"| {' | '.join(head)} |",
        "|" + "-|" * len(head),
    ]
    for rung in ladder.rungs:
        cells = [rung.name, str(rung.float_nodes), f"{rung.int8_macs:.1%}"]
        lines.append(f"| {' | '.join([*cells, *(cell(ladder, rung, backend) for backend in ladder.backends)])} |")
    lines += ["", *(f"- {backend}: not measured: {why}" for backend, why in ladder.missing.items())]
    return "\n".join(lines).rstrip() + "\n"


def plot_uri(ladder: Ladder) -> str | None:
    """`draw` for an ``<img>``, whose styles no content security policy of the page forbids; None without matplotlib."""
    if find_spec("matplotlib") is None or not ladder.backends:
        return None
    return f"data:image/svg+xml;base64,{base64.b64encode(draw(ladder).encode()).decode()}"


def draw(ladder: Ladder) -> str:
    """An SVG: AP, where the images have truth, and agreement by rung, a stepped line a backend."""
    import matplotlib
    from matplotlib.figure import Figure

    truth = all(score.ap >= 0 for rung in ladder.rungs for score in rung.scores)
    panels = (["AP"] if truth else []) + ["agreement with FP32"]
    # One file for one result: no date in it, no names drawn by lot.
    with matplotlib.rc_context({"svg.hashsalt": "alignment", "svg.fonttype": "none"}):
        figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
        for place, panel in enumerate(panels, 1):
            axes = figure.add_subplot(1, len(panels), place)
            _draw(axes, ladder, panel)
            if place == 1:
                figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue()


def _draw(axes: Any, ladder: Ladder, panel: str) -> None:
    for backend in ladder.backends:
        scores = [rung.on(backend) for rung in ladder.rungs]
        values = [(score.ap if panel == "AP" else score.agreement_ap) if score else float("nan") for score in scores]
        colour, marker = COLOURS.get(backend, "#57606a"), MARKERS.get(backend, "d")
        axes.step(range(len(values)), values, where="mid", color=colour, linewidth=1.2, alpha=0.6)
        axes.plot(range(len(values)), values, marker, color=colour, markersize=5, label=backend)
    names = [rung.name.replace(", ", "\n") for rung in ladder.rungs]
    axes.set_xticks(range(len(ladder.rungs)), names, rotation=25, ha="right")
    axes.set_ylabel(panel)
    axes.grid(alpha=0.3)
