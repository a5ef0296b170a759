"""Decodes images, and hears what the decoders say about them: libjpeg, libpng and OpenCV write that to stderr alone.

libjpeg makes an image of damaged data, fills what is missing with grey, and warns where it notices; OpenCV drops the
warning.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable

# OpenCV reads it once, when it is first imported: pixels of the largest picture, whose 0.8 GB it then decodes.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**28))

import cv2
import numpy as np

#: How lines of the decoders begin, or what else tells them from those of others.
_DECODERS = (b"Corrupt JPEG data", b"Premature end of JPEG file", b"libpng ", b"grfmt_", b"loadsave.cpp")
_DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG file", "libpng error")
# File descriptor 2 belongs to the whole process.
_one_at_a_time = threading.Lock()


def decode(data: np.ndarray) -> tuple[np.ndarray | None, str]:
    """Decodes a file's bytes ``[n] uint8``: ``[H, W, 3] uint8`` BGR, EXIF orientation applied.

    Returns:
        The image, None where there is none in it, and what a decoder said of damage, empty where all is well.
    """
    image: list[np.ndarray | None] = []

    def work() -> None:
        try:
            image.append(cv2.imdecode(data, cv2.IMREAD_COLOR))
        except cv2.error as error:  # of a picture that is larger, or says so
            lines.append(f"OpenCV: {error.err or error}")

    lines: list[str] = []
    damage = [line for line in _said_while(work) if line.startswith(_DAMAGE)] + lines
    return image[0] if image else None, damage[0] if damage else ""


def _said_while(work: Callable[[], object]) -> list[str]:
    """What the decoders write to stderr during `work`; what others write meanwhile gets there after it."""
    with _one_at_a_time, tempfile.TemporaryFile(buffering=0) as heard:
        try:
            stderr = os.dup(2)
        except OSError:  # closed: there is nothing to be heard
            work()
            return []
        try:
            os.dup2(heard.fileno(), 2)
            work()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        if not heard.tell():
            return []
        heard.seek(0)
        lines = heard.read().splitlines(keepends=True)
    ours: list[bytes] = []
    for line in lines:
        # Of a check that fails OpenCV writes what was checked, on lines of their own.
        goes_on = line.startswith(b">") and bool(ours)
        if goes_on or any(words in line for words in _DECODERS):
            ours.append(line)
    # OpenCV ends some of its lines twice.
    if others := b"".join(line for line in lines if line not in ours and (line.strip() or not ours)):
        os.write(2, others)
    return [line.decode(errors="replace").strip() for line in ours]
