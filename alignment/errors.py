"""The one error type a user is meant to read."""

from __future__ import annotations


class AlignError(Exception):
    """Wrong input or usage: one line that names the file or option, and how to mend it.

    The command line prints it without a traceback and exits with status 2.

    Args:
        what: what is wrong, naming the file, field or option.
        mend: what the user can do about it.
    """

    def __init__(self, what: str, mend: str = "") -> None:
        self.what, self.mend = what.rstrip("."), mend
        super().__init__(f"{self.what}: {mend}" if mend else self.what)


class BuildError(AlignError):
    """A graph that TensorRT parses and makes no engine of."""


#: What brings fake quantization in torch.
QUANTIZATION_MEND = "pip install absl-py prettytable scipy; pip install --no-deps pytorch-quantization==2.1.3"
