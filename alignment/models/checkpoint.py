"""Reads checkpoints without running anything that they contain, and loads them into models.

A checkpoint is a pickle, and a pickle can call any function.  `torch.load(weights_only=True)` calls only those that
rebuild tensors, but gives up on nearly every checkpoint of mmengine's Runner: beside the weights those hold log
buffers, numpy scalars and bound methods.  For them the same few functions are served and everything else becomes an
inert placeholder: it can be called, filled and configured as the pickle asks, and does nothing.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from alignment.errors import AlignError

STATE_KEY, EMA_KEY = "state_dict", "ema_state_dict"
# Counts batches since training began; no inference reads it, and small checkpoints leave it out.
COUNTER = "num_batches_tracked"
# What layers are called, in mmyolo's heads, whose width follows the number of classes.
CLASS_LAYERS = ("cls", "convs_pred")


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights that inference should use, on the CPU, in the checkpoint's dtypes.

    These are ``state_dict`` where the checkpoint has one (mmengine's EMAHook puts the averaged weights there), else
    ``ema_state_dict``, else the checkpoint itself.  Prefixes that wrappers add (``module.``) are taken off.

    Args:
        path: a file written by ``torch.save``, of the zip or the older format.

    Raises:
        AlignError: for a file that is missing, cut off, not a checkpoint or without tensors.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "there is no such file"
        raise AlignError(f"{path}: {what}", "give the path of a checkpoint (.pth)")
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = _unpickle(file)
    except Exception as error:  # a pickle is a program: any exception may come out of it
        raise _unreadable(path, error) from None
    content = _entries(content)
    if isinstance(content.get(STATE_KEY), dict):
        state = _tensors(content[STATE_KEY])
    elif isinstance(content.get(EMA_KEY), dict):
        state = _tensors(content[EMA_KEY])
        state.pop("steps", None)
        state = {key.removeprefix("module."): value for key, value in state.items()}
    else:
        state = _tensors(content)
    if not state:
        keys = ", ".join(repr(key) for key in list(content)[:5]) or "none"
        raise AlignError(f"{path}: holds no tensors (its keys: {keys})", "give a checkpoint with a state dict")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def load_into(model: torch.nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copies `state` into `model`, casting to the model's dtypes, when every key and shape fits.

    Only ``num_batches_tracked`` may be missing or left over.

    Args:
        model: what the weights are for; unchanged when they do not fit.
        state: as `load_state_dict` gives it.
        path: where `state` comes from, for the message.

    Raises:
        AlignError: for weights of another model: how many keys differ, and the first of each kind; and for tensors
            that are not plain ones.
    """
    own = {key: value for key, value in model.state_dict().items() if key in state or not key.endswith(COUNTER)}
    for key in (key for key in own if key in state):
        if kind := _odd_kind(state[key]):
            raise AlignError(
                f"{path}: {key} is a {kind} tensor", "save it as a dense one of real numbers, and with its values"
            )
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own and not key.endswith(COUNTER)]
    misshapen = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or unexpected or misshapen:

        def shapes(key: str) -> str:
            return f"{key} is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} in the model"

        if not missing and not unexpected and all(any(name in key for name in CLASS_LAYERS) for key in misshapen):
            raise AlignError(
                f"{path}: the number of classes does not fit: {shapes(misshapen[-1])}",
                "set num_classes in the config as the checkpoint was trained, or give another checkpoint",
            )
        reasons = []
        if missing:
            reasons.append(f"{len(missing)} missing (first: {missing[0]})")
        if unexpected:
            reasons.append(f"{len(unexpected)} unexpected (first: {unexpected[0]})")
        if misshapen:
            reasons.append(f"{len(misshapen)} of another shape (first: {shapes(misshapen[0])})")
        raise AlignError(
            f"{path}: does not fit the model, which has {len(own)} keys: {', '.join(reasons)}",
            "give the checkpoint that belongs to this config",
        )
    # Not strict for the counters alone.
    model.load_state_dict({key: state[key] for key in own}, strict=False)


def _odd_kind(tensor: Tensor) -> str | None:
    """What makes a tensor one that is not copied as it is into a plain one."""
    kinds = {
        "nested": tensor.is_nested,
        "sparse": tensor.layout is not torch.strided,
        "quantized": tensor.is_quantized,
        "meta": tensor.is_meta,
        "complex": tensor.is_complex(),
    }
    return next((kind for kind, is_one in kinds.items() if is_one), None)


def _unpickle(file: BinaryIO) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # Any other failure stays one: torch.load, told to be less strict, would run a TorchScript archive.
        file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=False, pickle_module=_InertPickle)


def _entries(content: Any) -> dict[Any, Any]:
    # Not content.items(): a pickle may have given an OrderedDict an attribute of that name.
    return dict(dict.items(content)) if isinstance(content, dict) else {}


def _tensors(content: dict[Any, Any]) -> dict[str, Tensor]:
    found = _entries(content).items()
    return {key: value.detach() for key, value in found if isinstance(key, str) and isinstance(value, Tensor)}


def _unreadable(path: Path, error: Exception) -> AlignError:
    """Says what the file is instead of a checkpoint, as far as its first bytes tell."""
    if isinstance(error, OSError) and error.filename is not None:
        return AlignError(f"{path}: cannot be read: {error.strerror}", "check the file and its permissions")
    with path.open("rb") as file:
        head = file.read(1024)
    again = "download the checkpoint again"
    if not head:
        return AlignError(f"{path}: is empty", again)
    if head.startswith(b"version https://git-lfs"):
        return AlignError(f"{path}: is a git-lfs pointer, not the file that it stands for", "run git lfs pull")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return AlignError(f"{path}: is a web page, not a checkpoint", f"{again}, with the link to the file itself")
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        return AlignError(f"{path}: is cut off: the end of the zip archive is missing", again)
    if "TorchScript" in str(error):
        mend = "give the weights instead, saved with torch.save(model.state_dict(), path)"
        return AlignError(f"{path}: is a TorchScript archive, a program", mend)
    if "explicit pickle_module" in str(error):
        mend = "unset TORCH_FORCE_WEIGHTS_ONLY_LOAD: nothing in the file will be run all the same"
        return AlignError(f"{path}: holds more than tensors", mend)
    if all(byte in b"\t\n\r\f" or byte >= 0x20 for byte in head):
        return AlignError(f"{path}: is a text file, not a checkpoint", again)
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return AlignError(f"{path}: is not a checkpoint that torch can read ({reason})", again)


def _ignore(*args: Any, **options: Any) -> None:
    """Whatever a pickle does to an object that is not needed."""


class _Inert:
    """Stands for every class and function that rebuilding tensors does not need, and for their results.

    That ``__setstate__`` exists is what keeps a pickle from setting attributes, here and on the other objects that
    it gets hold of.
    """

    __slots__ = ()
    # What torch asks of a storage class: an unknown one is read as bytes.
    dtype = torch.uint8

    def __new__(cls, *args: Any, **options: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        """Accepts any construction."""

    def __call__(self, *args: Any, **options: Any) -> _Inert:
        return _Inert()

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Dict(dict):
    """``collections.OrderedDict``, without the attributes that a pickle may give it (``_metadata`` of state dicts)."""

    __setstate__ = _ignore


class _Function:
    """A function that a pickle may call; unlike a plain one it has no attributes to be changed."""

    __slots__ = ("_function",)
    __setstate__ = _ignore

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


def _rebuild_tensor(storage: Any, offset: int, size: tuple, stride: tuple, *rest: Any) -> Any:
    """``torch._utils._rebuild_tensor`` and ``_v2``, whose further arguments are gradient flag, hooks, metadata."""
    if not isinstance(storage, torch.storage.TypedStorage) or any(rest[2:]):
        return _Inert()
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    """``torch._utils._rebuild_parameter`` and ``..._with_state``: the tensor is enough."""
    return data


_SERVED = {
    ("collections", "OrderedDict"): _Dict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Function(_rebuild_parameter),
}


class _InertUnpickler(pickle._Unpickler):
    """Imports nothing.  Storage classes (``torch.FloatStorage`` ...) are served by torch.load's own subclass.

    It is the one that is written in Python, whose memo has what a pickle puts there: the other's is as long as the
    largest number that a pickle gives, gigabytes for one damaged byte.
    """

    def find_class(self, module: str, name: str) -> Any:
        return _SERVED.get((module, name), _Inert)


class _InertPickle:
    """What torch.load needs of a module like `pickle`."""

    Unpickler = _InertUnpickler

    @staticmethod
    def load(file: BinaryIO, **options: Any) -> Any:
        return _InertUnpickler(file, **options).load()
