"""Ways to spoil NumPy's archives."""

from __future__ import annotations

import io
import zipfile
from random import Random

import numpy as np
from fuzz_mutations import MARKUP, spoilt_bytes

#: Stands for an array of 3 GB of zeros.
BOMB = b"bomb"


def spoilt_arrays(rng: Random, data: bytes) -> bytes:
    """An ``.npz`` whose bytes or arrays are spoilt."""
    if rng.random() < 0.3:
        return spoilt_bytes(rng, data)
    with np.load(io.BytesIO(data)) as stored:
        arrays = dict(stored)
    name = rng.choice(list(arrays))
    extra: dict[str, bytes] = {}
    match rng.randrange(9):
        case 0:
            del arrays[name]
        case 1:
            arrays[name] = _object_array()
        case 2:
            arrays[name] = rng.choice(
                (arrays[name].reshape(-1)[:-1], arrays[name].reshape(-1, 1), arrays[name][..., None])
            )
        case 3:
            kind = rng.choice(("f2", "f8", "i8", "u1", "c8", "?", "U3", "M8[s]", "S2"))
            with np.errstate(all="ignore"):
                arrays[name] = _as_type(arrays[name], kind)
        case 4:
            whole = np.array(arrays[name], copy=True).reshape(-1)
            if whole.size and whole.dtype.kind in "fiu":
                kind = np.float64 if whole.dtype.kind == "f" else whole.dtype
                worst = (
                    (np.nan, np.inf, -np.inf, 1e38)
                    if whole.dtype.kind == "f"
                    else tuple((np.iinfo(kind).max, np.iinfo(kind).min, 0))
                )
                for _ in range(rng.choice((1, 5, whole.size))):
                    whole[rng.randrange(whole.size)] = rng.choice(worst)
            arrays[name] = whole.reshape(arrays[name].shape)
        case 5:
            arrays[rng.choice(("../../escaped", "extra", MARKUP, "full_7_boxes", "about"))] = np.arange(3)
        case 6:
            extra[f"{name}.npy"] = _declared(rng.choice(((10**12,), (2**31, 2**31), (-3,), (2**62, 4), (10**9,))))
        case 7:
            extra[f"{name}.npy"] = rng.choice((b"", b"\x93NUMPY", spoilt_bytes(rng, _declared((3,)))))
        case _:
            extra[rng.choice((f"{name}.npy", "large.npy"))] = BOMB
    return _zipped(arrays, extra)


def _as_type(array: np.ndarray, kind: str) -> np.ndarray:
    try:
        return array.astype(kind)
    except (ValueError, TypeError):
        return np.zeros(array.shape, kind)


class Executed:
    """Unpickled, it makes a file ``executed`` in the folder that the command runs in."""

    def __reduce__(self) -> tuple:
        return open, ("executed", "w")


def _object_array() -> np.ndarray:
    array = np.empty(2, object)
    array[:] = [Executed(), None]
    return array


def _declared(shape: tuple[int, ...]) -> bytes:
    """A ``.npy`` that says it is much larger than it is."""
    text = repr({"descr": "<f8", "fortran_order": False, "shape": shape}).encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * 24


def _zipped(arrays: dict[str, np.ndarray], extra: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, array in arrays.items():
            if f"{name}.npy" not in extra:
                with file.open(f"{name}.npy", "w") as part:
                    np.lib.format.write_array(part, array, allow_pickle=True)
        for name, content in extra.items():
            with file.open(name, "w", force_zip64=True) as part:
                if content is BOMB:
                    size = 3 * 2**27
                    part.write(_declared((size,))[:-24])
                    for _ in range(size * 8 >> 24):
                        part.write(bytes(1 << 24))
                else:
                    part.write(content)
    return stream.getvalue()
