"""Faults in how this package's sources use TensorRT, by the names that its versions offer."""

from __future__ import annotations

import ast
import json
from pathlib import Path

from trt_uses import UNKNOWN, imports_tensorrt, names, opaque_names, uses

import alignment
from alignment.engine.capabilities import BEHIND
from alignment.variant import golden_dir

PACKAGE = Path(alignment.__file__).parent
SOURCES = {
    path: path.read_text()
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent.name in ("engine", "runners") or imports_tensorrt(ast.parse(path.read_text()))
}
OPAQUE = set().union(*(opaque_names(ast.parse(source)) for source in SOURCES.values()))
APIS = {path.stem: json.loads(path.read_text())["api"] for path in sorted((golden_dir() / "trt_api").glob("*.json"))}
MEMBERS = {version: set(api).union(*(members or () for members in api.values())) for version, api in APIS.items()}
#: Names of classes, functions and members that some versions have and others nowhere.
COMING_AND_GOING = set.union(*MEMBERS.values()) - set.intersection(*MEMBERS.values())
GUARDS = {member: {c for n, c in BEHIND.items() if n.split(".")[-1] == member} for member in COMING_AND_GOING}
#: What is called like one of those and is not TensorRT's.
NAMESAKES = {
    "case.precision": "of a Case",
    "options.precision": "of BuildOptions",
    "self.precision": "of BuildOptions, by itself",
    "self.release": "of Capabilities: the version",
    "np.int64": "NumPy's",
    "self.detections.update": "a dict",
    "table.update": "a dict",
    "allocation.free": "pycuda's",
    "self._memory.free": "device memory by tensor",
    "self.held.pop(name).free": "pycuda's",
}
UNLISTED = {"name"}  # on layers and tensors in every version; the listing leaves it out, as enumerations have it too


def exists(api: dict, name: str) -> bool:
    """Whether a version has ``Class``, ``function`` or ``Class.member``."""
    owner, _, member = name.partition(".")
    return owner in api and (not member or member in UNLISTED or member in (api[owner] or ()))


def anywhere(api: dict, member: str) -> bool:
    """Whether some class of a version has that member."""
    return any(member in (members or ()) for members in api.values())


def faults(source: str) -> list[str]:
    """Names that a version lacks and that no capability guards, and receivers that could be TensorRT's.

    Where TensorRT is not even imported, the receiver of an unknown name is looked up in all classes.
    """
    imported = imports_tensorrt(ast.parse(source))
    found = []
    for use in uses(source, OPAQUE):
        owner, _, member = use.name.partition(".")
        if owner == UNKNOWN:
            known = [anywhere(api, member) for api in APIS.values()]
            if imported or (any(known) and not all(known)):
                found.append(f"line {use.line}: {use.name} could be TensorRT's")
            continue
        lacking = [version for version, api in APIS.items() if not exists(api, use.name)]
        if lacking and BEHIND.get(use.name) not in use.guards:
            found.append(f"line {use.line}: {use.name} is not in TensorRT {', '.join(lacking)}")
    return found


def unguarded(source: str) -> list[str]:
    """Attributes, of whatever object, whose name comes and goes with the versions, without capability or reason."""
    return [
        f"line {use.line}: {use.text}: a name that some versions lack"
        for use in names(source)
        if use.name in COMING_AND_GOING and use.text not in NAMESAKES and not GUARDS[use.name] & use.guards
    ]
