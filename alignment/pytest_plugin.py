"""Options, markers and fixtures of the suite: ``pytest -m fp32_alignment --variant yolov8_n --data DIR``.

A test that takes the fixture `aligned_case` is repeated for every case of the precisions that its marker names; the
cases of one variant that were selected, of whatever precision, run together, once, in one worker.

``pytest --pyargs conformance --variant my.yaml`` runs the installed suite on a variant of your own; with ``--variant``
only the tests that take one are collected, beside those of your own folders.  With pytest-xdist each worker sees one
GPU, and ``-n auto`` starts one worker a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from alignment.case import BACKENDS, PRECISIONS, ROUTES, Case, cases_of
from alignment.errors import AlignError
from alignment.gpu_workers import gpus, take_gpu
from alignment.results import Alignment, CaseResult
from alignment.runners.base import limit_openmp
from alignment.storage import require_folder
from alignment.variant import Variant, golden_dir, load_variant, zoo

if TYPE_CHECKING:
    from alignment.quantize.recipe import Quantized

MARKERS = {
    "fp32_alignment": "torch, ONNX Runtime and TensorRT give the same answers in FP32",
    "fp16_alignment": "ONNX Runtime and TensorRT in FP16 find what torch finds in FP32",
    "int8_alignment": "INT8 finds what torch finds in FP32, by every route, and each backend computes the same graph",
    "sensitivity": "sweeps over layers name what int8 spoils, and their numbers are those of whole runs",
    "qat": "training with fake quantization betters int8, resumes to the bit, and ends in the graph that was trained",
    "nms": "post-processing: what each implementation keeps, and why they differ",
    "culprit": "engines taken apart, and the search for the Q/DQ pairs that make one worse than ONNX Runtime",
    "rotated": "rotated boxes: data, decoding, comparison, NMS and AP",
    "kill": "long commands that are killed at any moment go on, and end as if nothing had befallen them",
    "plugin": "NMS plugins of TensorRT: their oracle, the files that end in one, and the kernels themselves",
    "topk": "which candidates a TopK lets through, and what its limit costs",
    "gpu": "needs a GPU with TensorRT; replays a committed record where there is one",
    "real_data": "needs the real checkpoints and images below ALIGN_DATA",
}
#: The precisions of the cases for which a test with such a marker is repeated.
MARKED = {"fp32_alignment": ("fp32",), "fp16_alignment": ("fp16",), "int8_alignment": ("int8",)}
_STORE = pytest.StashKey["Store"]()
_SELECTED = pytest.StashKey[dict[str, list[Case]]]()
_PARTS = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the suite."""
    group = parser.getgroup("alignment")
    group.addoption("--variant", action="append", metavar="NAME", help="variant or YAML file; repeatable; default: all")
    group.addoption(
        "--data",
        type=Path,
        help="COCO-layout root, for variants on COCO, or DOTA's tiles, for rotated boxes; default below $ALIGN_DATA",
    )
    group.addoption("--images", type=_count, help="the first so many images only")
    group.addoption("--golden", type=Path, help="folder of golden values; default: the packaged one")
    group.addoption("--update-golden", metavar="REASON", help="write what is measured as golden, for REASON")
    group.addoption("--records", type=Path, metavar="DIR", help="write records of what is run into DIR")
    group.addoption("--kills", type=_count, default=2, help="kill each long command so often; 20 are the long form")
    group.addoption("--report", type=Path, metavar="DIR", help="write alignment.json, report.html and junit.xml there")


def pytest_configure(config: pytest.Config) -> None:
    """Registers markers, gives a worker its GPU, and refuses options that make no sense."""
    for name, text in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")
    if hasattr(config, "workerinput"):
        take_gpu(config.workerinput["workerid"], os.environ)  # type: ignore[attr-defined]
    config.stash[_PARTS] = []
    # One thread a process: the same numbers for any -n, and no workers in each other's way.
    os.environ.setdefault("ALIGN_THREADS", "1")
    limit_openmp()
    # pytest has a --strict of its own; here it also means that a case that cannot be run fails.  xdist hands the
    # controller's options to its workers.
    written = (
        config.invocation_params.args,
        shlex.split(os.environ.get("PYTEST_ADDOPTS", "")),
        config.getini("addopts"),
    )
    given = any("--strict" in words for words in written)
    config.option.strict_cases = given or getattr(config.option, "strict_cases", False)
    _require_folders(config)
    _chosen(config)  # a wrong name ends here, in one line, not as an error of each test that asks for it


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """``-n auto``: one worker a GPU; where there is none pytest-xdist decides."""
    return len(gpus(os.environ)) or None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object | None:
    """In place of pytest-xdist's, unless ``--dist`` asks for another of them."""
    if config.option.dist != "load":
        return None
    from alignment.scheduling import SharedScheduling

    return SharedScheduling(config, log, _chosen(config))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``--variant``, leaves out the suite's tests of this library itself: they take no variant."""
    if not config.option.variant or collection_path.suffix != ".py" or collection_path.parent not in _suite():
        return None
    return ("aligned_case" not in collection_path.read_text(encoding="utf-8")) or None


def _suite() -> list[Path]:
    """The folders of the suite, installed or beside this package."""
    spec = find_spec("conformance")
    return [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []


def _count(text: str) -> int:
    """A number of images on the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of images: give 1 or more")
    return int(text)


def _require_folders(config: pytest.Config) -> None:
    try:
        for option in ("report", "records"):
            if folder := getattr(config.option, option):
                require_folder(folder, f"--{option}")
    except AlignError as error:
        raise pytest.UsageError(str(error)) from None


class Store:
    """Results of this process, variant by variant."""

    def __init__(self, config: pytest.Config) -> None:
        from alignment import session
        from alignment.pipeline import RunOptions

        option = config.option
        self.golden: Path = option.golden or golden_dir()
        self.options = session.SessionOptions(
            option.data, option.images, RunOptions(golden=self.golden, out=option.report, records=option.records)
        )
        self.update_reason: str | None = option.update_golden
        self.alignment = session.new_alignment(shlex.join(["pytest", *sys.argv[1:]]))
        self._results: dict[str, dict[str, CaseResult]] = {}
        self._errors: dict[str, Exception] = {}

    def result(self, variant: Variant, case: Case, cases: list[Case]) -> CaseResult:
        """The result of `case`; runs all `cases` of its variant the first time.

        An error fails all of them in the report, and is raised again each time.
        """
        from alignment import session
        from alignment.golden import update

        if variant.name in self._errors:
            raise self._errors[variant.name]
        if variant.name not in self._results:
            try:
                results, seconds, dataset = session.run_cases(variant, cases, self.options)
            except Exception as error:
                self._errors[variant.name] = error
                reason = str(error) if isinstance(error, AlignError) else f"{type(error).__name__}: {error}"
                self.alignment.cases += [
                    CaseResult(case=one.result_id(), status="fail", reason=" ".join(reason.split())) for one in cases
                ]
                raise
            session.add_results(self.alignment, variant, results, seconds, dataset)
            self._results[variant.name] = {r.case.id: r for r in results}
            if self.update_reason:
                for result in results:
                    if result.status != "skip" and not result.replayed:
                        update(self.golden, result, dataset, self.update_reason)
        return self._results[variant.name][case.id]


def _chosen(config: pytest.Config) -> list[Variant]:
    try:
        return [load_variant(name) for name in config.option.variant or zoo()]
    except AlignError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a case; TensorRT cases are marked ``gpu``."""
    if "aligned_case" not in metafunc.fixturenames:
        return
    markers = {mark.name for mark in metafunc.definition.iter_markers()}
    precisions = tuple(p for name, chosen in MARKED.items() if name in markers for p in chosen) or ("fp32",)
    parameters = []
    for variant in _chosen(metafunc.config):
        # Quantizing a model of full size takes minutes: those are run where they are asked for.
        if precisions == ("int8",) and not (variant.embedded or metafunc.config.option.variant):
            continue
        for case in cases_of(variant, BACKENDS, precisions):
            marks = [pytest.mark.gpu] if case.backend == "tensorrt" else []
            parameters.append(pytest.param((variant, case), id=case.id, marks=marks))
    metafunc.parametrize("aligned_case", parameters, indirect=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Notes which cases of each variant were selected, to run them together."""
    selected: dict[str, set[Case]] = {}
    for item in session.items:
        callspec = getattr(item, "callspec", None)
        if callspec and "aligned_case" in callspec.params:
            variant, case = callspec.params["aligned_case"]
            selected.setdefault(variant.name, set()).add(case)
    session.config.stash[_SELECTED] = {name: sorted(cases, key=_order) for name, cases in selected.items()}


def _order(case: Case) -> tuple[int, int, int]:
    """As `cases_of` orders them."""
    route = ROUTES.index(case.route) if case.route else 0
    return BACKENDS.index(case.backend), PRECISIONS.index(case.precision), route


@pytest.fixture(scope="session")
def alignment_store(request: pytest.FixtureRequest) -> Store:
    """Results of this process."""
    return request.config.stash.setdefault(_STORE, Store(request.config))


@pytest.fixture
def aligned_case(request: pytest.FixtureRequest, alignment_store: Store) -> CaseResult:
    """The result of one case; skips, or with --strict fails, where it cannot be had."""
    variant, case = request.param
    result = alignment_store.result(variant, case, request.config.stash[_SELECTED][variant.name])
    if result.status == "skip":
        (pytest.fail if request.config.option.strict_cases else pytest.skip)(result.reason)
    return result


@pytest.fixture(scope="session")
def quantized_build() -> Callable[[Variant], Quantized]:
    """Quantizes a variant by its recipe, once a session; workers share what was calibrated through the cache."""
    from alignment.quantize.recipe import quantize

    built: dict[tuple[str, str], Quantized] = {}

    def build(variant: Variant) -> Quantized:
        key = variant.fingerprint(), variant.quantization.fingerprint()
        if key not in built:
            built[key] = quantize(variant)
        return built[key]

    return build


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    """The golden folder."""
    return request.config.option.golden or golden_dir()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hands a worker's results to the controller, which writes the RUN folder."""
    config = session.config
    store = config.stash.get(_STORE, None)
    part = store.alignment.model_dump_json() if store else None
    if hasattr(config, "workeroutput"):
        config.workeroutput["alignment"] = part  # type: ignore[attr-defined]
        return
    parts = [Alignment.model_validate(json.loads(text)) for text in [*config.stash[_PARTS], part] if text]
    if config.option.report and any(p.cases for p in parts):
        from alignment.report.run_folder import merge, write_run

        write_run(merge(parts), config.option.report)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Collects what a worker found."""
    part = getattr(node, "workeroutput", {}).get("alignment")
    if part:
        node.config.stash[_PARTS].append(part)
