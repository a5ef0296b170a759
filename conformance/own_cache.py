"""A cache of a test's own for the values that it measures; exports and images come from where they always do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.cache import Key, keep
from alignment.storage import cache_dir


def values_in(folder: Path) -> Callable[[Key, Callable[[], Any]], Any]:
    """In place of `alignment.cache.value`."""
    usual = cache_dir()

    def value(key: Key, make: Callable[[], Any]) -> Any:
        def outside() -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("ALIGN_CACHE", str(usual))
                return make()

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ALIGN_CACHE", str(folder))
            return keep.value(key, outside)

    return value
