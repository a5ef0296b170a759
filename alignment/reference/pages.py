"""Every page that is made from code: its place in the documentation, and its text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from alignment import golden, onnx_head, pytest_plugin, variant
from alignment.gate import policy
from alignment.reference import command_line, nms
from alignment.reference.fields import sections
from alignment.reference.markdown import code, prose, table


def golden_page() -> str:
    """The format of ``golden/<variant>.yaml``."""
    return "\n".join(
        [
            "# Golden files\n",
            "What the cases of a variant are held to, one file a variant. How a limit comes about is told in "
            "[What is compared](../explanation/comparison.md).\n",
            *sections(golden.Golden, golden.GoldenCase, golden.Tolerance, golden.GoldenAp, golden.Overlay),
            "## Limits\n",
            f"`--update-golden REASON` writes what is measured × {golden.FACTOR:g}, the AP with a margin of "
            f"{golden.AP_MARGIN:g}, in int8 of {golden.INT8_AP_MARGIN:g}. {', '.join(map(code, golden.MINIMA))} are "
            "the least that is allowed, other quantities the most.\n",
            "Where nothing was measured:\n",
            _by_precision(golden.DEFAULTS),
            "What is promised: no golden limit is looser, where what was measured keeps the promise.\n",
            _by_precision(golden.PROMISED),
        ]
    )


def _by_precision(limits: dict[str, dict[golden.Quantity, float]]) -> str:
    """Limits as a table, a column a precision."""
    names = dict.fromkeys(name for held in limits.values() for name in held)
    rows = [[code(name), *(f"{held[name]:g}" if name in held else "" for held in limits.values())] for name in names]
    return table(["quantity", *limits], rows)


def variant_page() -> str:
    """The format of a variant's YAML."""
    heads = onnx_head.OnnxHead.__args__
    parts = (variant.InputSize, variant.Preprocess, variant.Nms, variant.Quantization)
    return "\n".join(
        [
            "# Variant files\n",
            "One detector to be deployed, one YAML file. Paths are relative to it; `${ALIGN_DATA}` and other "
            "environment variables are expanded. Examples: [Describe a variant](../howto/variant.md).\n",
            *sections(variant.Variant, variant.MMYoloSource, variant.OnnxSource, *heads, *parts),
        ]
    )


def policy_page() -> str:
    """The format of a policy, and the packaged one."""
    return "\n".join(
        [
            "# Policy files\n",
            "What `align gate` holds a run to beside its golden values. This is the packaged one, which "
            "`align gate --print-policy` prints:\n",
            f"```yaml\n{policy.PACKAGED.read_text(encoding='utf-8').strip()}\n```\n",
            *sections(policy.Policy, policy.Rule, policy.Pattern),
            f"## Limits\n\n{prose(policy.Limits.__doc__ or '')}\n",
        ]
    )


class _Options:
    """Stands where pytest's parser does, and keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []

    def getgroup(self, _: str) -> _Options:
        """The one group."""
        return self

    def addoption(self, name: str, **fields: Any) -> None:
        """An option."""
        metavar = fields.get("metavar") or {"Path": "DIR"}.get(fields["type"].__name__, "N")
        self.rows.append([code(name), code(metavar), fields["help"]])


def suite_page() -> str:
    """Markers and options of the suite."""
    options = _Options()
    pytest_plugin.pytest_addoption(options)  # type: ignore[arg-type]
    return "\n".join(
        [
            "# The suite\n",
            "What this project adds to pytest, as `pytest --markers` and `pytest --help` tell it. pytest's own "
            "`--strict` also makes a case that is skipped a failure. How to run it on a variant of one's own: "
            "[In a repository of one's own](../howto/own-repository.md).\n",
            "## Markers\n",
            table(
                ["`pytest -m`", "what is held"], [[code(name), text] for name, text in pytest_plugin.MARKERS.items()]
            ),
            "## Options\n",
            table(["option", "value", "meaning"], options.rows),
        ]
    )


#: Where each page stands.
PAGES: dict[str, Callable[[], str]] = {
    "reference/cli.md": command_line.page,
    "reference/suite.md": suite_page,
    "reference/variant.md": variant_page,
    "reference/golden.md": golden_page,
    "reference/policy.md": policy_page,
    "reference/nms.md": nms.page,
}


def home(readme: str) -> str:
    """The README as the home page: its links to ``docs/`` are links to pages."""
    return re.sub(r"\]\(docs/", "](", readme)
