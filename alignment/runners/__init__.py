"""Backends: torch, onnxruntime, tensorrt, and records of earlier runs."""
