"""The ladder from float to int8 as a table."""

from __future__ import annotations

from alignment.report.shown import ABSENT, score, signed
from alignment.results import Ladder, Rung


def cell(ladder: Ladder, rung: Rung, backend: str) -> str:
    """``0.6628 / +0.0015 / 0.9837``: AP, its change against FP32 on that backend, agreement."""
    found = rung.on(backend)
    if found is None:
        return ABSENT
    return " / ".join((score(found.ap), signed(ladder.ap_change(rung, backend)), score(found.agreement_ap)))


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
