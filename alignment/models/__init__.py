"""Where detectors come from: mmyolo configs with checkpoints, and ONNX files."""
