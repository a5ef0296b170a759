"""From typed results to pages that people read; nothing here computes."""
