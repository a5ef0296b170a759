"""The suite.  Installed, it runs on a variant of your own: ``pytest --pyargs conformance --variant my.yaml``."""

import sys
from pathlib import Path

# The helpers beside the tests, and some tests, are imported by their bare names.
sys.path.insert(0, str(Path(__file__).parent))
