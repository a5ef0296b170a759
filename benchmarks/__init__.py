"""Speed, as ratios measured in one process; nothing here is a test."""
