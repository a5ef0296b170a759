"""Speed beside the peers, as ratios measured in one process: ``python -m benchmarks run``.  Nothing here is a test."""
