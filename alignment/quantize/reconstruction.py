"""Better weights for a quantized network: AdaRound over all its layers or blocks, and bias correction.

The network is gone through in the order of the graph, a unit at a time.  Images go through the float and the quantized
model up to it, the latter with all that was found before, and the unit's output is brought near to the float one.
Units that are sampled together each make good for the same errors before them, and the network gets worse.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from alignment.errors import AlignError
from alignment.quantize.adaround import Options, Reconstruction, Unit, nearest, reconstruct
from alignment.quantize.torch_model import QuantizedDetector, Quantizing
from alignment.storage import writing

if TYPE_CHECKING:
    from alignment.models.detector import Detector

#: Over all images, how many places of a layer's output are sampled, several times what a wide convolution has weights
#: for one of its channels; and how wide a block's samples are.
PLACES, WINDOW = 16384, 40
#: How many of the calibration images are used.
IMAGES = 32
#: Windows that a block is given at once.
WINDOWS_AT_ONCE = 4
Rounding = Literal["nearest", "adaround", "brecq"]


@dataclass
class _Layer:
    """A quantized convolution, and what was sampled of it."""

    node: str
    path: str
    initializer: str
    module: nn.Conv2d
    place: int
    act: Callable[[Tensor], Tensor]
    reads: Callable[[Tensor], Tensor]

    def take(self, generator: torch.Generator, count: int, read: Tensor, gave: Tensor) -> tuple[Tensor, Tensor]:
        """Samples `count` places: windows ``[P, C, k, k]`` of what it reads, ``[P, O, 1, 1]`` of the float output."""
        height, width = gave.shape[2:]
        chosen = torch.randint(height * width, (count,), generator=generator)
        rows, columns = chosen // width, chosen % width
        conv = self.module
        (down, right), (dy, dx) = conv.stride, conv.dilation
        reach_y, reach_x = ((k - 1) * d + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
        (pad_y, pad_x) = conv.padding if not isinstance(conv.padding, str) else (0, 0)
        padded = functional.pad(read, (pad_x, pad_x, pad_y, pad_y))
        windows = padded.unfold(2, reach_y, down).unfold(3, reach_x, right)[..., ::dy, ::dx]
        inputs = windows[0, :, rows, columns].transpose(0, 1).contiguous()
        return inputs, gave[0, :, rows, columns].T[:, :, None, None].contiguous()

    def run(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """The convolution of windows, without the activation."""
        return functional.conv2d(inputs, weight, self.module.bias, groups=self.module.groups)

    def scale(self, owner: QuantizedDetector) -> Tensor:
        """``[O, 1, 1, 1]``."""
        amax: Any = owner.weights[self.place].amax
        return (amax / 127).detach()


@dataclass(frozen=True)
class Improved:
    """What was found.

    Attributes:
        weights: by initializer: each element a whole number of steps.
        biases: float32, by node, where they were corrected.
        units: what came of each layer or block, in the order of the graph.
    """

    weights: dict[str, np.ndarray]
    biases: dict[str, np.ndarray]
    units: tuple[Reconstruction, ...]


def improve(
    float_model: Detector,
    quantized: QuantizedDetector,
    images: Iterable[np.ndarray],
    rounding: Rounding = "adaround",
    correct_bias: bool = False,
    options: Options | None = None,
    progress: Callable[[int, int], None] | None = None,
    kept: Path | None = None,
) -> Improved:
    """Finds weights, and puts them into `quantized`; both models are left on the device of `options`.

    Args:
        float_model: fused, not the one inside `quantized`.
        quantized: the same with fake quantization.
        images: ``[1, 3, H, W] float32``; the first `IMAGES` are used.
        rounding: ``adaround`` layer by layer, ``brecq`` block by block where a block keeps the size of its input.
        correct_bias: whether the mean error of each output channel is taken off its bias, afterwards.
        options: of the optimization.
        progress: called with the number of units done, and all.
        kept: a folder for what is found, a file a unit; what lies there was found by a search like this that was
            interrupted, and is taken.
    """
    options = options or Options()
    read = [torch.from_numpy(image).to(options.device) for image in itertools.islice(images, IMAGES)]
    scene = _Scene(float_model.to(options.device), quantized.to(options.device), read, options.seed)
    layers = list(_layers(quantized))
    blocks = _blocks(quantized, layers, scene.images[0]) if rounding == "brecq" else {}
    order = _in_units(layers, blocks)
    found = Improved({}, {}, ())
    for number, (path, members) in enumerate(order):
        file = None if kept is None else kept / f"{number}.npz"
        part = _read(file) if file and file.is_file() else None
        if part is None:
            part = _improved(scene, path, members, rounding, correct_bias, options)
            if file:
                _write(part, file)
        for layer in members:
            _put(part, layer)
        found = Improved(found.weights | part.weights, found.biases | part.biases, found.units + part.units)
        if progress:
            progress(number + 1, len(order))
    return found


def _improved(
    scene: _Scene, path: str, members: list[_Layer], rounding: Rounding, correct_bias: bool, options: Options
) -> Improved:
    """What is found for one unit: the block at `path`, or the layer that is its only member."""
    found = Improved({}, {}, ())
    if rounding != "nearest":
        unit = _block_unit(scene, path, members) if path else _layer_unit(scene, members[0])
        done = reconstruct(unit, replace(options, batch=WINDOWS_AT_ONCE) if path else options)
        found = Improved({name: weight.numpy() for name, weight in done.weights.items()}, {}, (done,))
    for layer in members if correct_bias else ():
        _put(found, layer)
        found.biases[layer.node] = _correct(scene, layer)
    return found


def _put(found: Improved, layer: _Layer) -> None:
    """Writes what was found into the model."""
    if layer.initializer in found.weights:
        layer.module.weight.data.copy_(torch.from_numpy(found.weights[layer.initializer]))
    if layer.node in found.biases:
        assert layer.module.bias is not None
        layer.module.bias.data.copy_(torch.from_numpy(found.biases[layer.node]))


def _write(found: Improved, path: Path) -> None:
    units = [[unit.name, unit.nearest, unit.adaround] for unit in found.units]
    arrays = {f"weights/{name}": value for name, value in found.weights.items()}
    arrays |= {f"biases/{name}": value for name, value in found.biases.items()}
    with writing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, units=np.array(json.dumps(units)), **arrays)  # type: ignore[arg-type]


def _read(path: Path) -> Improved | None:
    """What `_write` wrote; None for a file that cannot be read."""
    try:
        with np.load(path) as stored:
            arrays = dict(stored)
        told = json.loads(str(arrays.pop("units")))
        units = tuple(Reconstruction(name, before, after, {}) for name, before, after in told)
    except Exception:  # zip, NumPy and JSON each have their own
        return None
    parts: dict[str, dict[str, np.ndarray]] = {"weights": {}, "biases": {}}
    for key, array in arrays.items():
        kind, _, name = key.partition("/")
        parts[kind][name] = array
    return Improved(**parts, units=units)


def _layers(owner: QuantizedDetector) -> Iterator[_Layer]:
    """The quantized convolutions, in the order of the graph; transposed ones stay rounded to nearest."""
    modules = dict(owner.detector.named_modules())
    found = []
    for (path, op), planned in owner._plan.items():
        module = modules[path]
        if op != "Conv" or not isinstance(module, nn.Conv2d) or len(planned) != 1 or planned[0].weight is None:
            continue
        place = planned[0].weight
        around = modules.get(path.rpartition(".")[0])
        act = getattr(around, "activate", None) if getattr(around, "with_activation", False) else None
        quantizer = owner.activations[planned[0].inputs[0]]
        initializer = owner.initializers[place]
        found.append((place, _Layer(planned[0].node, path, initializer, module, place, act or _same, quantizer)))
    yield from (layer for _, layer in sorted(found, key=lambda one: one[0]))


def _same(values: Tensor) -> Tensor:
    return values


def _blocks(owner: QuantizedDetector, layers: Sequence[_Layer], image: Tensor) -> dict[str, list[_Layer]]:
    """Outermost modules that join branches themselves, read one tensor, and give one of the same height and width."""
    joins = sorted({path for path, op in owner._plan if op in ("Add", "Concat") and path}, key=len)
    fits = []
    modules = dict(owner.detector.named_modules())

    def look(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            one = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor)
            if one and args[0].shape[2:] == output.shape[2:]:
                fits.append(path)

        return hook

    handles = [modules[path].register_forward_hook(look(path)) for path in joins]
    with torch.no_grad():
        owner.detector(image)
    for handle in handles:
        handle.remove()
    once = [path for path in joins if fits.count(path) == 1]
    outermost = [p for p in once if not any(p.startswith(f"{other}.") for other in once)]
    inside = {p: [layer for layer in layers if layer.path.startswith(f"{p}.")] for p in outermost}
    return {path: members for path, members in inside.items() if len(members) > 1}


def _in_units(layers: Sequence[_Layer], blocks: dict[str, list[_Layer]]) -> list[tuple[str, list[_Layer]]]:
    """(path of the block, or "", layers), in the order of each unit's first layer."""
    owner = {layer.node: path for path, members in blocks.items() for layer in members}
    units: dict[str, tuple[str, list[_Layer]]] = {}
    for layer in layers:
        path = owner.get(layer.node, "")
        units.setdefault(path or layer.node, (path, []))[1].append(layer)
    return list(units.values())


@dataclass(frozen=True)
class _Scene:
    """Both models, and the images that go through them."""

    float_model: Detector
    owner: QuantizedDetector
    images: list[Tensor]
    seed: int

    def pairs(self, path: str) -> Iterator[tuple[Tensor, Tensor]]:
        """What a module reads in the quantized model, and what it gives in the float one; image by image."""
        theirs, ours = self.float_model.get_submodule(path), self.owner.detector.get_submodule(path)
        for image in self.images:
            with torch.no_grad():
                yield (
                    _until(ours, self.owner, image, lambda args, _: args[0]),
                    _until(theirs, self.float_model, image, lambda _, output: output),
                )


class _Reached(Exception):
    """Stops a forward where nothing behind is of interest."""


def _until(module: nn.Module, model: nn.Module, image: Tensor, choose: Callable[[Any, Any], Tensor]) -> Tensor:
    """What `choose` takes of the arguments and the output of a module, when a model comes to it."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        # A copy: activations that follow work in place.
        found.append(choose(args, output).clone())
        raise _Reached

    handle = module.register_forward_hook(hook)
    try:
        model(image)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def _sampled(scene: _Scene, layer: _Layer) -> tuple[Tensor, Tensor]:
    """Windows of what a layer reads, and the float outputs at their places, before the activation."""
    parts = []
    count = -(-PLACES // len(scene.images))
    for number, (read, gave) in enumerate(scene.pairs(layer.path)):
        generator = torch.Generator().manual_seed(scene.seed + number)
        with torch.no_grad():
            parts.append(layer.take(generator, count, layer.reads(read), gave))
    inputs, outputs = (torch.cat(side) for side in zip(*parts, strict=True))
    return inputs, outputs


def _layer_unit(scene: _Scene, layer: _Layer) -> Unit:
    inputs, outputs = _sampled(scene, layer)
    return Unit(
        layer.node,
        inputs,
        layer.act(outputs),
        lambda values, weights: layer.act(layer.run(values, weights[0])),
        {layer.initializer: layer.module.weight.detach().clone()},
        {layer.initializer: layer.scale(scene.owner)},
    )


def _window(seed: int, read: Tensor, gave: Tensor) -> tuple[Tensor, Tensor]:
    """The same window of both, `WINDOW` wide and high or less."""
    generator = torch.Generator().manual_seed(seed)
    y, x = (int(torch.randint(max(1, size - WINDOW + 1), (1,), generator=generator)) for size in read.shape[2:])
    rows, columns = slice(y, y + WINDOW), slice(x, x + WINDOW)
    return read[..., rows, columns].clone(), gave[..., rows, columns].clone()


def _block_unit(scene: _Scene, path: str, members: list[_Layer]) -> Unit:
    """A block on windows; along their border, where it reads beyond them, its output is not compared."""
    owner = scene.owner
    module = owner.detector.get_submodule(path)
    windows = [_window(scene.seed + number, *pair) for number, pair in enumerate(scene.pairs(path))]
    inputs, targets = (torch.cat(side) for side in zip(*windows, strict=True))
    margin = min(sum(layer.module.kernel_size[0] // 2 for layer in members), (targets.shape[-1] - 8) // 2)
    inner = slice(margin, -margin or None) if targets.shape[-1] == WINDOW else slice(None)

    def run(values: Tensor, weights: list[Tensor]) -> Tensor:
        kept = [owner.weights[layer.place] for layer in members]
        for layer, weight in zip(members, weights, strict=True):
            owner.weights[layer.place] = _Given(weight, layer.scale(owner) * 127)
        try:
            with Quantizing(owner, path):
                return module(values)[..., inner, inner]  # type: ignore[no-any-return]
        finally:
            for layer, quantizer in zip(members, kept, strict=True):
                owner.weights[layer.place] = quantizer

    weights = {layer.initializer: layer.module.weight.detach().clone() for layer in members}
    scales = {layer.initializer: layer.scale(owner) for layer in members}
    return Unit(path, inputs, targets[..., inner, inner].contiguous(), run, weights, scales)


class _Given(nn.Module):
    """In a weight quantizer's place: a weight that is quantized already."""

    def __init__(self, weight: Tensor, amax: Tensor) -> None:
        super().__init__()
        self.__dict__["weight"], self.__dict__["amax"] = weight, amax

    def forward(self, weight: Tensor) -> Tensor:
        return self.__dict__["weight"]  # type: ignore[no-any-return]


def _correct(scene: _Scene, layer: _Layer) -> np.ndarray:
    """Takes the mean error of each output channel, before the activation, off the bias; returns the bias."""
    bias = layer.module.bias
    if bias is None:
        raise AlignError(f"node {layer.node}: no bias to correct", "fold batch normalization into it, or give it one")
    inputs, outputs = _sampled(scene, layer)
    with torch.no_grad():
        weight = nearest(layer.module.weight, layer.scale(scene.owner))
        bias -= (layer.run(inputs, weight) - outputs).mean((0, 2, 3))
    return bias.detach().cpu().numpy().copy()
