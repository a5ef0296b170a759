"""Datasets, preprocessing and the embedded synthetic set."""

import alignment.data.decoder  # noqa: F401 - before anything imports OpenCV
