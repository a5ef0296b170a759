"""Makes `import mmcv._ext` find the pure-torch stand-in where mmcv was installed without its compiled ops.

`install` registers an import hook, here and in the processes that multiprocessing starts afterwards; nothing is
written anywhere.  The hook is asked last, so that a compiled `mmcv._ext` always wins.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing.spawn
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

EXTENSION = "mmcv._ext"
STAND_IN = Path(__file__).with_name("mmcv_ext.py")
# An entry of multiprocessing's preparation data that it does not know is unpickled and otherwise left alone.
PREPARATION_KEY = "alignment.models.mmcv_finder"


class MmcvExtFinder(MetaPathFinder):
    """Resolves `mmcv._ext`, and nothing else, to the file of the stand-in."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the stand-in under the name `mmcv._ext`, None for any other module."""
        return importlib.util.spec_from_file_location(EXTENSION, STAND_IN) if fullname == EXTENSION else None


def install() -> None:
    """Registers the hook in this process and in those that it spawns; again does nothing.

    Call it before mmcv.ops, mmdet, mmyolo or mmrotate is imported.  Child processes started with `spawn` or
    `forkserver` install it before they import anything of the parent's.
    """
    if not any(isinstance(finder, MmcvExtFinder) for finder in sys.meta_path):
        sys.meta_path.append(MmcvExtFinder())
    original = multiprocessing.spawn.get_preparation_data
    if not hasattr(original, "installs_mmcv_finder"):
        multiprocessing.spawn.get_preparation_data = _with_install(original)  # type: ignore[assignment]


class _InstallInChild:
    """Calls `install` in the process that unpickles it.

    The child unpickles its preparation data before it has the parent's sys.path, so this package may not be
    importable yet; its folder goes first until the child takes over the parent's sys.path, the next thing it does.
    """

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        root = str(Path(__file__).resolve().parents[2])
        return exec, (f"import sys; sys.path.insert(0, {root!r})\nfrom {__name__} import install\ninstall()",)


def _with_install(original: Callable[[str], dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    @functools.wraps(original)
    def get_preparation_data(name: str) -> dict[str, Any]:
        # First in the dictionary: entries are unpickled in order.
        return {PREPARATION_KEY: _InstallInChild(), **original(name)}

    get_preparation_data.installs_mmcv_finder = True  # type: ignore[attr-defined]
    return get_preparation_data
