"""Datasets, preprocessing and the embedded synthetic set."""
