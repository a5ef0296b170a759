"""Everything of the suite lives in `alignment.pytest_plugin`; loaded here where the package is not installed."""

from importlib.metadata import entry_points

if not any(e.value == "alignment.pytest_plugin" for e in entry_points(group="pytest11")):
    pytest_plugins = ["alignment.pytest_plugin"]
