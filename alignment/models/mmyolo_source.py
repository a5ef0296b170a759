"""Detectors from mmyolo: config and checkpoint in, one torch module with named outputs out."""

from __future__ import annotations

import collections.abc
import importlib
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.errors import AlignError
from alignment.variant import MMYoloSource, Variant

if TYPE_CHECKING:
    from alignment.models.detector import Detector


#: Weights that no machine notices, whatever the checkpoint has.
_SMALL = 2**24


def require_mmyolo() -> None:
    """Makes mmyolo importable (with the stand-in for mmcv's compiled ops) and registers its classes.

    Raises:
        AlignError: naming the package that is missing.
    """
    from alignment.models import mmcv_finder

    mmcv_finder.install()
    # mmyolo tries mmrotate, whose 1.0.0rc1 imports this name from where Python had it before 3.10.
    collections.Sequence = collections.abc.Sequence  # type: ignore[attr-defined]
    warnings.filterwarnings("ignore", module="mmengine|mmcv|mmdet|mmyolo")
    warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
    warnings.filterwarnings("ignore", message="torch.meshgrid")  # mmdet's call, but it is blamed on torch
    try:
        for module in ("mmdet.evaluation", "mmyolo.models", "mmyolo.datasets", "mmyolo.engine", "mmyolo.utils"):
            importlib.import_module(module)
    except ImportError as error:
        raise AlignError(f"mmyolo cannot be imported: {error}", "pip install '.[mmyolo]' in the repository") from None
    from mmengine.registry import init_default_scope

    init_default_scope("mmyolo")


def require_mmrotate() -> None:
    """Registers mmrotate's classes, which rotated detectors are made of.

    Raises:
        AlignError: when it is not installed.
    """
    require_mmyolo()
    try:
        for module in ("mmrotate.models", "mmrotate.datasets"):
            importlib.import_module(module)
    except ImportError as error:
        mend = "pip install --no-deps mmrotate==1.0.0rc1 && pip install e2cnn"
        raise AlignError(f"mmrotate cannot be imported: {error}", mend) from None


def load_config(variant: Variant) -> Any:
    """The variant's mmengine Config, its options merged, nothing left that would download.

    Raises:
        AlignError: for a config that is not there or cannot be read.
    """
    (require_mmrotate if variant.rotated else require_mmyolo)()
    import mmyolo
    from mmengine.config import Config

    source = _source(variant)
    path = Path(mmyolo.__file__).parent / ".mim" / "configs" / source.config
    if not path.is_file():
        raise AlignError(
            f"{variant.name}: source.config: {source.config} is neither in mmyolo's configs nor a file beside the YAML",
            f"name a file below {Path(mmyolo.__file__).parent / '.mim' / 'configs'}",
        )
    try:
        for name in source.imports:
            importlib.import_module(name)
        config = Config.fromfile(path)
        config.merge_from_dict(dict(source.options))
        _forget_downloads(config.model)
    except Exception as error:  # a config is Python: anything may come out of it
        raise AlignError(f"{path}: {_line(error)}", "mend the config or the variant's options") from None
    config.load_from = None
    return config


def build_detector(variant: Variant) -> Detector:
    """The variant's model with its weights, float32, eval mode, as it was trained (nothing fused).

    Raises:
        AlignError: for a config that cannot be built or a checkpoint that does not fit.
    """
    config = load_config(variant)
    from mmengine.logging import MMLogger
    from mmyolo.registry import MODELS

    from alignment.models.checkpoint import load_into, load_state_dict
    from alignment.models.detector import Detector

    source = _source(variant)
    state = load_state_dict(source.checkpoint)
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    try:
        with _bounded(4 * sum(tensor.numel() for tensor in state.values()) + _SMALL):
            model = MODELS.build(config.model)
    except Exception as error:  # whatever a config's classes raise
        raise AlignError(f"{source.config}: the model cannot be built: {_line(error)}", "mend the config") from None
    load_into(model, state, source.checkpoint)
    classes = model.bbox_head.num_classes
    if classes != variant.classes:
        raise AlignError(
            f"{variant.name}: classes: {variant.classes}, but the model has {classes}", "mend the variant's YAML"
        )
    return Detector(model, variant.input).eval()


def _bounded(most: int) -> Any:
    """A context in which layers of more weights than `most` raise ValueError, before there is memory for them.

    Layers of torch ask for memory by ``torch.empty``; what a config's own classes ask for otherwise is not counted.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Bounded(TorchFunctionMode):
        """Counts what layers make to be filled."""

        left = most

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.empty:
                (size,) = args if len(args) == 1 else (kwargs.get("size", args),)
                self.left -= math.prod(size) if isinstance(size, Sequence) else size
                if self.left < 0:
                    raise ValueError("it has many times the weights of its checkpoint")
            return func(*args, **kwargs)

    return Bounded()


def _source(variant: Variant) -> MMYoloSource:
    if not isinstance(variant.source, MMYoloSource):
        raise AlignError(f"{variant.name}: has no torch model", "give a variant whose source.kind is mmyolo")
    return variant.source


def _forget_downloads(node: Any) -> None:
    """Drops every ``init_cfg``: the checkpoint brings the weights."""
    if isinstance(node, dict):
        if "init_cfg" in node:
            node["init_cfg"] = None
        for value in node.values():
            _forget_downloads(value)
    elif isinstance(node, list | tuple):
        for value in node:
            _forget_downloads(value)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
