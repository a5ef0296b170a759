"""Accuracy alignment of YOLO detectors from torch to ONNX to TensorRT."""

__version__ = "0.1.0"
