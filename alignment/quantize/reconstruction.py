"""Better weights for a quantized network: AdaRound over all its layers or blocks, and bias correction.

The network is gone through in passes.  Each takes the next layers in the order of the graph: images go through the
float and the quantized model side by side, the latter with the weights that were found before, and what these layers
read and give is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from alignment.quantize.adaround import Options, Reconstruction, Unit, nearest, reconstruct
from alignment.quantize.torch_model import QuantizedDetector, Quantizing

if TYPE_CHECKING:
    from alignment.models.detector import Detector

#: Over all images, how many places of a layer's output are sampled, and how wide a block's samples are.
PLACES, WINDOW = 2048, 40
#: How often images go through the network.
PASSES = 4
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
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def take(self, generator: torch.Generator, count: int, read: Tensor, gave: Tensor) -> None:
        """Samples `count` places: windows ``[P, C, k, k]`` of what it reads, ``[P, O, 1, 1]`` of the float output."""
        height, width = gave.shape[2:]
        chosen = torch.randint(height * width, (count,), generator=generator)
        rows, columns = chosen // width, chosen % width
        conv = self.module
        (down, right), (kh, kw) = conv.stride, conv.kernel_size
        (pad_y, pad_x) = conv.padding if not isinstance(conv.padding, str) else (0, 0)
        windows = functional.pad(read, (pad_x, pad_x, pad_y, pad_y)).unfold(2, kh, down).unfold(3, kw, right)
        self.inputs.append(windows[0, :, rows, columns].transpose(0, 1).contiguous())
        self.outputs.append(gave[0, :, rows, columns].T[:, :, None, None].contiguous())

    def run(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """The convolution of windows, without the activation."""
        bias = None if self.module.bias is None else self.module.bias.to(inputs.device)
        return functional.conv2d(inputs, weight, bias, groups=self.module.groups)

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
    images: Callable[[], Iterator[np.ndarray]],
    count: int,
    rounding: Rounding = "adaround",
    correct_bias: bool = False,
    options: Options | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Improved:
    """Finds weights, and puts them into `quantized`.

    Args:
        float_model: fused, not the one inside `quantized`.
        quantized: the same with fake quantization.
        images: gives ``[1, 3, H, W] float32``, anew at each call.
        count: of these.
        rounding: ``adaround`` layer by layer, ``brecq`` block by block where a block keeps the size of its input.
        correct_bias: whether the mean error of each output channel is taken off its bias, afterwards.
        options: of the optimization.
        progress: called with the number of units done, and all.
    """
    options = options or Options()
    layers = list(_layers(quantized))
    blocks = _blocks(quantized, layers, images) if rounding == "brecq" else {}
    order = _in_units(layers, blocks)
    weights: dict[str, np.ndarray] = {}
    biases: dict[str, np.ndarray] = {}
    done: list[Reconstruction] = []
    for part in np.array_split(np.arange(len(order)), min(PASSES, len(order))):
        chosen = [order[i] for i in part]
        windows = _sample(float_model, quantized, chosen, blocks, images, -(-PLACES // count), options.seed)
        for path, members in chosen:
            if rounding != "nearest":
                unit = (
                    _block_unit(quantized, path, members, windows[path]) if path else _layer_unit(quantized, *members)
                )
                settings = replace(options, batch=WINDOWS_AT_ONCE) if path else options
                done.append(reconstruct(unit, settings))
                for layer in members:
                    layer.module.weight.data.copy_(done[-1].weights[layer.initializer])
                    weights[layer.initializer] = layer.module.weight.detach().numpy().copy()
            for layer in members if correct_bias else ():
                _correct(quantized, layer)
                assert layer.module.bias is not None
                biases[layer.node] = layer.module.bias.detach().numpy().copy()
            for layer in members:
                layer.inputs, layer.outputs = [], []
            if progress:
                progress(len(done) if rounding != "nearest" else len(biases), len(order))
    return Improved(weights, biases, tuple(done))


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


def _blocks(
    owner: QuantizedDetector, layers: Sequence[_Layer], images: Callable[[], Iterator[np.ndarray]]
) -> dict[str, list[_Layer]]:
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
        owner.detector(torch.from_numpy(next(images())))
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


def _sample(
    float_model: Detector,
    owner: QuantizedDetector,
    units: Sequence[tuple[str, list[_Layer]]],
    blocks: dict[str, list[_Layer]],
    images: Callable[[], Iterator[np.ndarray]],
    places: int,
    seed: int,
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Fills the layers' samples, and gives those of blocks: windows of what it reads quantized and gives in float."""
    theirs, ours = dict(float_model.named_modules()), dict(owner.detector.named_modules())
    gave: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    layers = [layer for _, members in units for layer in members]
    paths = [path for path, _ in units if path]

    def note_output(path: str) -> Callable[..., None]:
        return lambda module, args, output: gave.__setitem__(path, output)

    def note_input(path: str) -> Callable[..., None]:
        return lambda module, args: read.__setitem__(path, args[0])

    watched = [*(layer.path for layer in layers), *paths]
    handles = [theirs[path].register_forward_hook(note_output(path)) for path in watched]
    handles += [ours[path].register_forward_pre_hook(note_input(path)) for path in watched]
    windows: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in paths}
    for number, image in enumerate(images()):
        with torch.no_grad():
            float_model(torch.from_numpy(image))
            owner(torch.from_numpy(image))
            for index, layer in enumerate(layers):
                generator = torch.Generator().manual_seed(seed + 1009 * number + index)
                layer.take(generator, places, layer.reads(read[layer.path]), gave[layer.path])
            for path in paths:
                windows[path].append(_window(seed + number, read[path], gave[path]))
    for handle in handles:
        handle.remove()
    return windows


def _window(seed: int, read: Tensor, gave: Tensor) -> tuple[Tensor, Tensor]:
    """The same window of both, `WINDOW` wide and high or less."""
    generator = torch.Generator().manual_seed(seed)
    y, x = (int(torch.randint(max(1, size - WINDOW + 1), (1,), generator=generator)) for size in read.shape[2:])
    rows, columns = slice(y, y + WINDOW), slice(x, x + WINDOW)
    return read[..., rows, columns].clone(), gave[..., rows, columns].clone()


def _layer_unit(owner: QuantizedDetector, layer: _Layer) -> Unit:
    return Unit(
        layer.node,
        torch.cat(layer.inputs),
        layer.act(torch.cat(layer.outputs)),
        lambda inputs, weights: layer.act(layer.run(inputs, weights[0])),
        {layer.initializer: layer.module.weight.detach().clone()},
        {layer.initializer: layer.scale(owner)},
    )


def _block_unit(
    owner: QuantizedDetector, path: str, members: list[_Layer], windows: list[tuple[Tensor, Tensor]]
) -> Unit:
    """A block on windows; along their border, where it reads beyond them, its output is not compared."""
    module = dict(owner.detector.named_modules())[path]
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


def _correct(owner: QuantizedDetector, layer: _Layer) -> None:
    """Takes the mean error of each output channel, before the activation, off the bias."""
    assert layer.module.bias is not None
    with torch.no_grad():
        weight = nearest(layer.module.weight, layer.scale(owner))
        error = layer.run(torch.cat(layer.inputs), weight) - torch.cat(layer.outputs)
        layer.module.bias -= error.mean((0, 2, 3))
