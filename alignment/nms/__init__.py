"""Reference semantics of NMS."""
