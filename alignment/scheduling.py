"""Which tests pytest-xdist sends to one worker: those that share what takes long to make.

xdist's own ``--dist loadgroup`` writes the group into a test's id, which pytest lets nobody do since 9.2: nothing is
said, and each test goes wherever there is room (https://github.com/pytest-dev/pytest-xdist/issues/1386).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from alignment.case import BACKENDS, PRECISIONS, cases_of
from alignment.variant import Variant

_SHARED = re.compile(r"scope=[\"'](module|class)[\"']")


class SharedScheduling(LoadScopeScheduling):
    """Tests of one `scope` go to one worker.

    xdist begins with the scopes of most tests; those of one test come last, so that no worker ends long before another.
    """

    def __init__(self, config: pytest.Config, log: Any, variants: list[Variant]) -> None:
        super().__init__(config, log)
        cases = {case.id: variant.name for variant in variants for case in cases_of(variant, BACKENDS, PRECISIONS)}
        self._scope = cache(lambda nodeid: scope(nodeid, config.rootpath, cases))

    def _split_scope(self, nodeid: str) -> str:
        """What xdist asks of each test, each time that one has ended."""
        return self._scope(nodeid)


def scope(nodeid: str, root: Path, cases: Mapping[str, str]) -> str:
    """What a test shares with others: the results of a variant, or the fixtures of a file or of its classes.

    Args:
        nodeid: as pytest names it.
        root: what files are named from.
        cases: ids of cases with the names of their variants.

    Returns:
        The name of the variant, the file, or of a test that shares nothing its own id.
    """
    file, _, test = nodeid.partition("::")
    text = _text(root / file)
    if text is None or "aligned_case" in text:
        # The longest: a variant may be named my_yolov8_n.
        case = max((case for case in cases if case in test), key=len, default=None)
        if case is not None:
            return cases[case]
    return file if text is None or _SHARED.search(text) else nodeid


@cache
def _text(file: Path) -> str | None:
    """The source of tests; None of an installed suite, whose files pytest does not name from its root."""
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
