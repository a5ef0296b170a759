"""The commands of README and documentation that no test runs, and why; each is held to the real command line."""

from __future__ import annotations

from fnmatch import fnmatchcase

REAL = "needs real checkpoints and images below ALIGN_DATA, and minutes"
GPU = "needs a GPU with TensorRT"
MINUTES = "takes minutes"
SUITE = "is this suite, or a part of it"
ENVIRONMENT = "makes an environment; .ci/run makes it"
READER = "names files or runs of the reader's; the page, or the tutorial, runs the like on its own"

#: Wildcards as in a shell, and the reason.  The first that fits counts; one that fits nothing is an error.
NOT_RUN: tuple[tuple[str, str], ...] = (
    ("align run", f"of all embedded variants {MINUTES}; the suite runs them"),
    ("align inspect yolov8_n *", GPU),
    ("align culprit yolov8_n *", GPU),
    ("align run yolov8_n *", REAL),
    ("align export yolov8_n *", REAL),
    ("align export rtmdet_r_tiny *", REAL),
    ("align sensitivity yolov8_n *", REAL),
    ("align partial yolov8_n *", REAL),
    ("align explain yolov8_n *", REAL),
    ("align run rtmdet_r_embedded * path/to/dota8", REAL),
    ("align qat yolov6_embedded --out qat", f"{MINUTES}; the tutorial trains for one epoch on 16 images"),
    ("align ladder yolov6_embedded *", f"{MINUTES}; its rungs are the tutorial's"),
    ("align new my_detector *", READER),
    ("align run my_detector.yaml *", READER),
    ("align table runs/yolov8_n runs/my_detector", READER),
    ("align report runs/* --out report.html", READER),
    ("align gate runs/new --baseline runs/old", READER),
    ("align gate run --baseline last *", READER),
    ("align cache prune*", "reads and removes what whoever runs the suite has kept; test_cache.py runs it"),
    ("pytest --pyargs conformance --variant my.yaml -m fp32_alignment --golden golden --report run", READER),
    ("pytest -m *", SUITE),
    ("tox *", ENVIRONMENT),
    ("pip *", ENVIRONMENT),
    ("python -m alignment.models.train_embedded *", MINUTES),
    ("python -m benchmarks *", f"{MINUTES}; conformance/test_benchmarks.py has contestants that take none"),
    ("python -m benchmarks.*", REAL),
    ("cmake *", "needs CMake and TensorRT's headers; `pytest -m plugin` compiles where they are"),
)


def reason(text: str) -> str | None:
    """Why a command is not run; None where it is."""
    return next((why for pattern, why in NOT_RUN if fnmatchcase(text, pattern)), None)
