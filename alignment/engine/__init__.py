"""TensorRT: what a version can do, building engines, reading their logs."""
