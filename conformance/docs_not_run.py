"""The commands of README and documentation that no test runs, and why; each is held to the real command line."""

from __future__ import annotations

from fnmatch import fnmatchcase

REAL = "needs the real checkpoint and images below ALIGN_DATA, and minutes"
SUITE = "is this suite, or a part of it"
GPU = "needs a GPU with TensorRT"
MINUTES = "takes minutes"
ENVIRONMENT = "makes an environment; .ci/run does"

#: Wildcards as in a shell, and the reason.  The first that fits counts; one that fits nothing is an error.
NOT_RUN: tuple[tuple[str, str], ...] = (
    ("align run", "runs all embedded variants; the suite does"),
)


def reason(text: str) -> str | None:
    """Why a command is not run; None where it is."""
    return next((why for pattern, why in NOT_RUN if fnmatchcase(text, pattern)), None)
