"""A run over several variants: what can run here runs, what was recorded is replayed, the rest says why not."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alignment import __version__
from alignment.case import Case
from alignment.data.samples import Samples, calibration_annotations, dataset_root, images_mend, open_samples
from alignment.engine import capabilities
from alignment.errors import QUANTIZATION_MEND, AlignError
from alignment.pipeline import RunOptions, align_live, explain_tf32, skipped
from alignment.replay import has_record, replay
from alignment.results import Alignment, CaseResult
from alignment.variant import Variant, golden_dir

#: What helps where a backend, precision and route are no case of a variant.
NO_CASE_MEND = (
    "torch runs fp32 and int8 of variants with a torch model, tf32 is TensorRT's, and of int8's routes only qdq is not"
)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SessionOptions:
    """See `RunOptions`; `data` is a COCO-layout root, `images` a limit, `run` how to run."""

    data: Path | None = None
    images: int | None = None
    run: RunOptions = field(default_factory=RunOptions)


def run_cases(
    variant: Variant, cases: list[Case], options: SessionOptions, progress: Progress | None = None
) -> tuple[list[CaseResult], dict[str, float], dict[str, Any]]:
    """Results of the cases of one variant, live, replayed or skipped; seconds; what dataset they stand on.

    Raises:
        AlignError: for input that is there and cannot be used.
    """
    golden = options.run.golden
    why_no_trt = capabilities.missing() if any(c.backend == "tensorrt" for c in cases) else None
    why_not_live = unavailable(variant, options.data)
    live, recorded, results = [], [], {}
    for case in cases:
        reason = why_not_live or (why_no_trt if case.backend == "tensorrt" else None) or _lacks(variant, case, options)
        if reason is None:
            live.append(case)
        elif case.backend == "tensorrt" and has_record(golden, case):
            recorded.append(case)
        else:
            results[case] = skipped(case, reason)
    samples: Samples | None = None
    if dataset_root(variant, options.data) is not None and (live or recorded):
        samples = open_samples(variant, options.data, options.images)
    seconds: dict[str, float] = {}
    if live:
        assert samples is not None
        count = len(samples)
        done, seconds = align_live(
            variant, live, samples, options.run, (lambda n: progress(n, count)) if progress else None
        )
        results.update(zip(live, done, strict=True))
    for case in recorded:
        results[case] = replay(variant, case, golden, samples)
    ordered = [results[case] for case in cases]
    for case, result in zip(cases, ordered, strict=True):
        result.command = command(variant, case, options)
    if recorded:
        explain_tf32([results[case] for case in recorded])
    dataset = {}
    if samples is not None:
        dataset = {
            "root": samples.dataset.root.name,
            "split": samples.dataset.split,
            "images": len(samples),
            "fingerprint": samples.dataset.fingerprint,
        }
    return ordered, seconds, dataset


def _lacks(variant: Variant, case: Case, options: SessionOptions) -> str | None:
    """What an int8 case needs beside weights and images: the package for it in torch, images to calibrate on."""
    if case.precision != "int8":
        return None
    if case.backend == "torch" and find_spec("pytorch_quantization") is None:
        return f"pytorch-quantization is not installed: {QUANTIZATION_MEND}"
    annotations = calibration_annotations(variant, options.data)
    if annotations is not None and not annotations.is_file():
        return f"{annotations}: no such file: int8 is calibrated on the training images, put them there"
    return None


def command(variant: Variant, case: Case, options: SessionOptions) -> str:
    """The `align run` of this case alone, with the same images and the same batch."""
    words = [f"align run {variant.arguments} --backend {case.backend} --precision {case.precision}"]
    words += [f"--route {case.route}"] if case.route else []
    words += [f"--data {shlex.quote(str(options.data))}"] if options.data else []
    words += [f"--images {options.images}"] if options.images else []
    words += [f"--batch {options.run.batch}"] if options.run.batch > 1 else []
    if options.run.golden.resolve() != golden_dir().resolve():
        words.append(f"--golden {shlex.quote(str(options.run.golden))}")
    return " ".join(words)


def unavailable(variant: Variant, data: Path | None) -> str | None:
    """Why a variant cannot be run here: weights, images or packages that are nowhere; None when nothing is missing."""
    if not variant.weights.is_file():
        return f"{variant.weights}: no such file: set ALIGN_DATA, or name the weights in the variant's YAML"
    if dataset_root(variant, data) is None:
        return f"{variant.name}: no images: {images_mend(variant)}"
    if variant.rotated and variant.has_torch and not all(map(find_spec, ("mmrotate", "e2cnn"))):
        return f"{variant.name}: mmrotate is not installed: pip install e2cnn; pip install --no-deps mmrotate==1.0.0rc1"
    return None


def require_available(variant: Variant, data: Path | None) -> None:
    """Raises AlignError for what `unavailable` finds."""
    if reason := unavailable(variant, data):
        what, _, mend = reason.rpartition(": ")
        raise AlignError(what, mend)


def require(variant: Variant, cases: list[Case], options: SessionOptions) -> None:
    """Raises AlignError when a variant was asked for by name that has no such case, or no weights or images here."""
    if not cases:
        raise AlignError(f"{variant.name}: none of its cases has this backend, precision and route", NO_CASE_MEND)
    if not all(c.backend == "tensorrt" and has_record(options.run.golden, c) for c in cases):
        require_available(variant, options.data)


def new_alignment(command: str) -> Alignment:
    """An empty RUN, stamped with this machine."""
    return Alignment(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        machine={
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "cpus": os.cpu_count(),
            "alignment": __version__,
        },
    )


def add_results(
    alignment: Alignment, variant: Variant, results: list[CaseResult], seconds: dict[str, float], dataset: dict
) -> None:
    """Adds what `run_cases` returned."""
    alignment.cases += results
    alignment.timing |= {f"{variant.name}.{key}": round(value, 4) for key, value in seconds.items()}
    if dataset:
        alignment.dataset[variant.name] = dataset
