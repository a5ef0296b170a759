"""Engines taken apart: which ONNX node runs where, in what precision, and what stands in the way of int8; drawings."""
