"""From a BGR image to the network's input, as mmyolo's and mmdet's test pipelines do it, to the bit."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from alignment.variant import InputSize, Preprocess

_INTERPOLATION = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
}


@dataclass(frozen=True)
class Transform:
    """How pixels of the original image became pixels of the network input: ``x_input = x * scale + offset``.

    Attributes:
        scale: (x, y).
        offset: padding on the left and on top, in pixels of the input.
        original: (height, width) of the original image.
    """

    scale: tuple[float, float]
    offset: tuple[float, float]
    original: tuple[int, int]

    def to_original(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes ``[n, 4]`` (x1, y1, x2, y2) from the input's pixels to the original image's, in their own dtype.

        Rotated boxes ``[n, 5]`` as mmrotate's ``RotatedBoxes.rescale_``.  Where the scales of x and y differ, by the
        rounding of the image's size to whole pixels, a rectangle comes out sheared a little: the sides keep their
        lengths and h its direction.
        """
        if boxes.shape[1] == 5:
            return self._rotated_to_original(boxes)
        offset = np.array(self.offset * 2, boxes.dtype)
        return (boxes - offset) / np.array(self.scale * 2, boxes.dtype)

    def clip(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes ``[n, 4]`` in the original image's pixels, clipped to it; rotated ones are left as they are."""
        if boxes.shape[1] == 5:
            return boxes
        height, width = self.original
        limit = np.array([width, height] * 2, boxes.dtype)
        return np.minimum(np.maximum(boxes, 0), limit)

    def _rotated_to_original(self, boxes: np.ndarray) -> np.ndarray:
        scale_x, scale_y = 1 / self.scale[0], 1 / self.scale[1]
        centre = (boxes[:, :2] - np.array(self.offset, boxes.dtype)) * np.array([scale_x, scale_y], boxes.dtype)
        cos, sin = np.cos(boxes[:, 4]), np.sin(boxes[:, 4])
        w = boxes[:, 2] * np.hypot(scale_x * cos, scale_y * sin)
        h = boxes[:, 3] * np.hypot(scale_x * sin, scale_y * cos)
        return np.column_stack([centre, w, h, np.arctan2(scale_x * sin, scale_y * cos)])


def preprocess(image: np.ndarray, size: InputSize, settings: Preprocess) -> tuple[np.ndarray, Transform]:
    """Resizes, pads, reorders and normalizes one image.

    Args:
        image: ``[H, W, 3] uint8``, BGR.
        size: of the network input.
        settings: of the variant.

    Returns:
        ``[3, size.height, size.width] float32``, C-contiguous, and the geometry to undo it.
    """
    canvas, transform = _RESIZE[settings.resize](image, size, settings)
    # A byte has 256 values: what becomes of them is looked up, which costs a third of computing it for every pixel.
    # Subtract and divide in float32, in this order: the bits equal those of the frameworks' tensors.
    mean, std = (np.array(values, np.float32)[:, None] for values in (settings.mean, settings.std))
    tables = (np.arange(256, dtype=np.float32) - mean) / std
    tensor = np.empty((3, *canvas.shape[:2]), np.float32)
    for channel, table in enumerate(tables):
        plane = cv2.extractChannel(canvas, 2 - channel if settings.channels == "rgb" else channel)
        cv2.LUT(plane, table, dst=tensor[channel])
    return tensor, transform


def _letterbox(image: np.ndarray, size: InputSize, settings: Preprocess) -> tuple[np.ndarray, Transform]:
    """mmyolo's YOLOv5KeepRatioResize followed by LetterResize(allow_scale_up=False)."""
    height, width = image.shape[:2]
    ratio = _keep_ratio(height, width, size)
    resized = image
    if ratio != 1:
        resized = _resize(image, int(width * ratio), int(height * ratio), settings.interpolation, ratio)
    rows, columns = resized.shape[:2]
    # Long and short sides may be swapped between image and input: the second step then shrinks once more.
    ratio = min(size.height / rows, size.width / columns, 1.0)
    # Where mmyolo would come to no pixels and fail, one is kept.
    fitted = max(round(columns * ratio), 1), max(round(rows * ratio), 1)
    if (columns, rows) != fitted:
        resized = _resize(resized, *fitted, "bilinear", ratio)
    pad_h, pad_w = size.height - resized.shape[0], size.width - resized.shape[1]
    top, left = round(pad_h // 2 - 0.1), round(pad_w // 2 - 0.1)
    canvas = _pad(resized, (top, pad_h - top, left, pad_w - left), settings.pad_value)
    scale = (fitted[0] / columns * (columns / width), fitted[1] / rows * (rows / height))
    return canvas, Transform(scale, (float(left), float(top)), (height, width))


def _letterbox_top_left(image: np.ndarray, size: InputSize, settings: Preprocess) -> tuple[np.ndarray, Transform]:
    """mmdet's Resize(keep_ratio=True) followed by Pad to the input's size.

    mmdet fits long edge to long edge; an image that lies across a rectangular input would then stick out of it, and
    is fitted to it here.
    """
    height, width = image.shape[:2]
    ratio = min(size.height / height, size.width / width)
    resized = _resize(image, int(width * ratio + 0.5), int(height * ratio + 0.5), settings.interpolation, ratio)
    rows, columns = resized.shape[:2]
    canvas = _pad(resized, (0, size.height - rows, 0, size.width - columns), settings.pad_value)
    return canvas, Transform((columns / width, rows / height), (0.0, 0.0), (height, width))


def _stretch(image: np.ndarray, size: InputSize, settings: Preprocess) -> tuple[np.ndarray, Transform]:
    """mmdet's Resize(keep_ratio=False)."""
    height, width = image.shape[:2]
    ratio = min(size.height / height, size.width / width)
    resized = _resize(image, size.width, size.height, settings.interpolation, ratio)
    return resized, Transform((size.width / width, size.height / height), (0.0, 0.0), (height, width))


_RESIZE = {"letterbox": _letterbox, "letterbox_top_left": _letterbox_top_left, "stretch": _stretch}


def _keep_ratio(height: int, width: int, size: InputSize) -> float:
    long_edge, short_edge = max(size.height, size.width), min(size.height, size.width)
    return min(long_edge / max(height, width), short_edge / min(height, width))


def _resize(image: np.ndarray, width: int, height: int, interpolation: str, ratio: float) -> np.ndarray:
    if interpolation == "auto":
        interpolation = "area" if ratio < 1 else "bilinear"
    return cv2.resize(image, (max(width, 1), max(height, 1)), interpolation=_INTERPOLATION[interpolation])


def _pad(image: np.ndarray, sides: tuple[int, int, int, int], value: int) -> np.ndarray:
    return cv2.copyMakeBorder(image, *sides, cv2.BORDER_CONSTANT, value=(value,) * 3)
