"""What TensorRT says while it builds and runs, and which of it a user must know.

TensorRT keeps one logger per process: whichever came first receives the messages of all later builders and runtimes,
and must outlive them.  So there is one logger here, never freed, and `listening` routes what it hears.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

MAX_CHARS = 300
# A kind of message with more different texts than this is told by its first one and a count.
MAX_PER_KIND = 3

# Kind -> pattern of TensorRT's own wording (8.x to 10.x logs in public issues); the first match names the kind.
KINDS = {
    "weights out of range": r"weights are affected by this issue|list of affected weights:"
    r"|outside of int8_t range|subnormal fp16 value|issues when converted to (fp16|int8)",
    "weights clamped": r"outside the range of \w+ was clamped",
    "int64 cast": r"generated with int64 weights|cast(ing)? .*int64|int64 .*cast",
    "missing scale": r"missing (scale|dynamic range)|calibrator is not being used",
    "no int8 implementation": r"(no|non)[- ]int8 implementation|int8 implementation .*not",
    "no implementation": r"could not find any implementation|no implementation of layer",
    "TopK limit": r"topk.*(3840|exceed|maximum)|k exceeds the maximum",
    "Myelin": r"myelin.*(error|fail|exception)",
    "tactic failed": r"skipping tactic|tactic .*(fail|error|insufficient)|insufficient to use tactic",
    "plugin not found": r"could not find plugin|plugin not found|cannot find plugin",
    "overflow": r"\boverflow",
    "foreign engine": r"across different models of devices|engine plan file .*not compatible",
    "library mismatch": r"linked against .* but loaded",
    "deprecated": r"\bdeprecated\b",
}
_PATTERNS = {kind: re.compile(pattern, re.IGNORECASE | re.DOTALL) for kind, pattern in KINDS.items()}
_ERRORS = ("INTERNAL_ERROR", "ERROR")
_SOURCE_PREFIX = re.compile(r"^\S+\.(cpp|h|hpp|cu):\d+:\s*")


class Message(NamedTuple):
    """One message; `severity` is a name of ``ILogger.Severity``."""

    severity: str
    text: str


class Log:
    """Messages in the order of their coming; verbose ones are dropped, except those that name affected weights."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def add(self, severity: str, text: str) -> None:
        """Keeps one message."""
        if severity != "VERBOSE" or "affected weights:" in text:
            self.messages.append(Message(severity, text))

    def errors(self, last: int = 3) -> list[str]:
        """The last error messages, each on one line."""
        return [_one_line(message.text) for message in self.messages if message.severity in _ERRORS][-last:]


def warnings_of(messages: Iterable[tuple[str, str]]) -> list[str]:
    """The messages that users must know, one line each, without repetition: ``kind: text``.

    Errors count always; of the others those that `KINDS` knows.  A kind with more than `MAX_PER_KIND` different texts
    (a missing scale for each of 300 tensors) becomes its first text and a count.
    """
    found: dict[str, dict[str, None]] = {}
    for severity, text in messages:
        kind = _kind(severity, text)
        if kind:
            found.setdefault(kind, {})[_one_line(text)] = None
    lines = []
    for kind, texts in found.items():
        shown = list(texts)
        if len(shown) > MAX_PER_KIND:
            shown = [f"{shown[0]} (and {len(shown) - 1} more of this kind)"]
        lines += [f"{kind}: {text}" for text in shown]
    return lines


@contextmanager
def listening(log: Log) -> Iterator[Any]:
    """Gives the process's ``trt.ILogger``; what it hears while the block is open goes to `log` too."""
    logger = _logger()
    with _lock:
        _listeners.append(log)
    try:
        yield logger
    finally:
        with _lock:
            del _listeners[next(i for i, other in enumerate(_listeners) if other is log)]


def receive(severity: str, text: str) -> None:
    """Hands a message to all that listen; TensorRT calls it from its own threads too."""
    with _lock:
        for log in _listeners:
            log.add(severity, text)


_lock = threading.RLock()
_listeners: list[Log] = []


@functools.cache
def _logger() -> Any:
    """The one logger.  Its class can only be made here, as its base comes from the lazily imported module."""
    import tensorrt as trt

    class Listener(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, msg: str) -> None:
            receive(severity.name, msg)

    return Listener()


def _kind(severity: str, text: str) -> str | None:
    for kind, pattern in _PATTERNS.items():
        if pattern.search(text):
            return kind
    return "error" if severity in _ERRORS else None


def _one_line(text: str) -> str:
    line = _SOURCE_PREFIX.sub("", " ".join(text.split())).removeprefix("- ")
    return line if len(line) <= MAX_CHARS else line[: MAX_CHARS - 1] + "…"
