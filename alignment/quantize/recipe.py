"""From a variant to its int8 artefacts: one calibration, one placement, one set of scales, for every route."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
from onnx import numpy_helper

from alignment.cache import Key, digest_of, kept, resumable
from alignment.data.samples import CALIBRATION_SPLIT, Samples, open_samples
from alignment.engine.int8 import write_cache
from alignment.errors import AlignError
from alignment.export.onnx_export import exported, file_digest
from alignment.export.plugin_nms import refuse_plugin
from alignment.quantize.calibrate import Calibration, activations, calibrate, identity_of
from alignment.quantize.equalization import equalize
from alignment.quantize.observers import fake_quantize, scale_of, weight_amax
from alignment.quantize.placement import Placement, place, quantizable
from alignment.quantize.qdq import group_amax, write_qdq
from alignment.quantize.trained import Trained
from alignment.reading import read_arrays
from alignment.storage import writing
from alignment.variant import Quantization, Variant

Progress = Callable[[str, int, int], None]
#: TensorRT whose name a calibration cache carries unless another is asked for.
CACHE_VERSION = "8.6.1"
# Files of entries in the cache.
_CALIBRATION, _WEIGHTS, _UNITS = "calibration.npz", "weights.npz", "units"


@dataclass(frozen=True)
class Searched:
    """Mean squared error of a unit's outputs, weights rounded to nearest, and by AdaRound."""

    name: str
    nearest: float
    adaround: float


@dataclass(frozen=True)
class Quantized:
    """A quantized variant.

    Attributes:
        recipe: what it was made by.
        source: the float32 ONNX file, as exported, or equalized and with weights that were searched for.
        model: the same with QDQ nodes.
        placement: where these are.
        amax: largest magnitude of the activation tensors that were calibrated, members of one group alike.
        scales: of the quantized activations, float32.
        weight_scales: ``[C] float32`` of the quantized initializers.
        calibration: what it stands on.
        units: what AdaRound came to, layer by layer or block by block.
    """

    recipe: Quantization
    source: Path
    model: onnx.ModelProto
    placement: Placement
    amax: dict[str, float]
    scales: dict[str, np.float32]
    weight_scales: dict[str, np.ndarray]
    calibration: Calibration
    units: tuple[Searched, ...] = ()

    @property
    def ranges(self) -> tuple[tuple[str, float], ...]:
        """For the routes without QDQ: the range of every tensor, by name.

        Raises:
            AlignError: where not all were calibrated.
        """
        if self.unranged:
            what = f"{self.source}: {len(self.unranged)} tensors were not calibrated, {self.unranged[0]} first"
            raise AlignError(what, "quantize with `every`, for routes other than qdq")
        return tuple((name, value) for name, value in self.amax.items() if value > 0)

    @cached_property
    def unranged(self) -> tuple[str, ...]:
        """The activation tensors that were not calibrated: no policy quantizes them."""
        return tuple(name for name in activations(onnx.load(self.source)) if name not in self.amax)

    def only(self, nodes: Collection[str], activations: bool = True, weights: bool = True) -> onnx.ModelProto:
        """The graph in which only these nodes read int8, of activations, weights or both; scales stay as they are."""
        chosen = self.placement.restricted(nodes, activations, weights)
        return write_qdq(onnx.load(self.source), chosen, self.scales, self.weight_scales)

    def cache(self, version: str = CACHE_VERSION) -> str:
        """The same as text of a calibration cache, for TensorRT of that version."""
        return write_cache(dict(self.ranges), version)

    def save(self, folder: Path, name: str) -> list[Path]:
        """Writes the graphs and all that belongs to them, and returns the paths.

        ``<name>.qdq.onnx``; where every tensor was calibrated, ``<name>.float.onnx``, the graph without QDQ nodes,
        and for it ``<name>.ranges.json`` and ``<name>.calibration``, a TensorRT calibration cache;
        ``<name>.scales.json``, every scale with its statistics.  Where not every one was, files of these names that are
        of something else go.
        """
        graphs, texts = {f"{name}.qdq.onnx": self.model}, {}
        if self.unranged:
            for suffix in ("float.onnx", "ranges.json", "calibration"):
                (folder / f"{name}.{suffix}").unlink(missing_ok=True)
        else:
            graphs[f"{name}.float.onnx"] = onnx.load(self.source)
            texts[f"{name}.ranges.json"] = json.dumps(dict(self.ranges), indent=1)
            texts[f"{name}.calibration"] = self.cache()
        texts[f"{name}.scales.json"] = json.dumps(self.report(), indent=1)
        paths = []
        for file_name, model in graphs.items():
            paths.append(folder / file_name)
            with writing(paths[-1]) as temporary:
                onnx.save(model, temporary)
        for file_name, text in texts.items():
            paths.append(folder / file_name)
            with writing(paths[-1]) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
        return paths

    def report(self) -> dict[str, Any]:
        """Every scale with what it was made from."""
        places = {quantizer.tensor: quantizer for quantizer in self.placement.activations}
        activations = {}
        for name, statistics in self.calibration.tensors.items():
            entry: dict[str, Any] = {"amax": self.amax[name], "minimum": statistics.minimum}
            entry |= {"maximum": statistics.maximum, "average": statistics.average, "elements": statistics.elements}
            if name in places:
                entry |= {"scale": float(self.scales[name]), "group": places[name].group, "rule": places[name].rule}
            activations[name] = entry
        weights = {
            quantizer.initializer: {
                "node": quantizer.node,
                "axis": quantizer.axis,
                "scales": [float(scale) for scale in self.weight_scales[quantizer.initializer]],
            }
            for quantizer in self.placement.weights
        }
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "identity": self.calibration.identity,
            "float_nodes": self.placement.float_nodes,
            "activations": activations,
            "weights": weights,
            "adaround": [asdict(unit) for unit in self.units],
        }


def calibration_samples(variant: Variant, data: Path | None = None) -> Samples:
    """The images that a variant is calibrated on."""
    return open_samples(variant, data, variant.quantization.images, CALIBRATION_SPLIT)


def quantize(
    variant: Variant,
    data: Path | None = None,
    batch: int = 1,
    progress: Progress | None = None,
    device: str = "cpu",
    ranges: Mapping[str, float] | None = None,
    every: bool = True,
) -> Quantized:
    """Calibrates where that was not done yet, places quantizers, finds weights, and writes all into the graph.

    Args:
        variant: to quantize, by its `quantization`.
        data: COCO-layout root, for variants on COCO.
        batch: images that go through ONNX Runtime at once.
        progress: called with what is being done, how many are done, and all.
        device: of torch, where weights are searched for: "cpu" or "cuda".
        ranges: largest magnitude by tensor, in place of the calibrated one: those of another tool's calibration.
        every: whether every activation tensor is calibrated, as routes other than qdq need, or, in little more than
            half the time, only those that a policy may quantize.  Scales and QDQ graph are the same.

    Raises:
        AlignError: for images or weights that are missing, unknown methods or nodes, scales that int8 cannot have, and
            ranges for what has trained scales.
    """
    recipe = variant.quantization
    source = _with_scales_of_channels(refuse_plugin(exported(variant).onnx, "no int8 here"), variant.name)
    trained = None if recipe.trained is None else Trained.load(recipe.trained, variant)
    if recipe.trained is not None and trained is not None:
        if ranges is not None:
            raise AlignError(
                f"{recipe.trained}: scales that were trained, and ranges of another tool", "give one of them"
            )
        model = onnx.load(source)
        trained.require_fitting(model, recipe.trained)
        model = with_weights(model, trained.weights, trained.biases)
        source = graph_file(model, f"{variant.name}.trained")
    elif recipe.equalization:
        source = graph_file(equalize(onnx.load(source))[0], f"{variant.name}.equalized")
    samples = calibration_samples(variant, data)
    joint = recipe.calibration == "joint" and trained is None
    observed = _with_int8_weights(source, variant) if joint else source
    move = (lambda done: progress("calibration", done, len(samples))) if progress else None
    calibration = _calibrated(observed, variant.name, samples, batch, move, every)
    if trained is not None:
        return _with_trained_scales(source, recipe, calibration, trained)
    found = apply(source, recipe, calibration, ranges)
    if not search_identity(recipe, device):
        return found
    return _improved(variant, found, samples, progress, device)


def _calibrated(
    source: Path, name: str, samples: Samples, batch: int, progress: Callable[[int], None] | None, every: bool
) -> Calibration:
    """From the cache; one there that is without some of the tensors gives way to one of all that are wanted."""
    model = onnx.load(source)
    wanted = activations(model) if every else quantizable(model)

    def check(folder: Path) -> None:
        path = folder / _CALIBRATION
        if path.is_file():
            Calibration.load(path).only(wanted, path)

    key = Key("calibration", name, *_split(identity_of(source, samples)))
    with resumable(key, check) as folder:
        return calibrate(source, samples, folder / _CALIBRATION, batch, progress, wanted)


def _with_scales_of_channels(source: Path, name: str) -> Path:
    """The graph in opset 13, if it is in an older one: the first whose QuantizeLinear has a scale for each channel."""
    model = onnx.load(source)
    if all(o.version >= 13 for o in model.opset_import if o.domain in ("", "ai.onnx")):
        return source
    return graph_file(onnx.version_converter.convert_version(model, 13), f"{name}.opset13")


def _with_int8_weights(source: Path, variant: Variant) -> Path:
    """The graph with weights as int8 keeps them, activations in float."""
    model = onnx.load(source)
    placement = place(model, variant.quantization.policy, variant.quantization.keep_float)
    weights = {weight.name: numpy_helper.to_array(weight) for weight in model.graph.initializer}
    values = {}
    for quantizer in placement.weights:
        weight = weights[quantizer.initializer]
        scale = scale_of(weight_amax(weight, quantizer.axis, variant.quantization.weights))
        values[quantizer.initializer] = fake_quantize(weight, scale, quantizer.axis, -127)
    return graph_file(with_weights(model, values, {}), f"{variant.name}.weights")


def _with_trained_scales(source: Path, recipe: Quantization, calibration: Calibration, trained: Trained) -> Quantized:
    """The graph with trained weights at its trained scales; a calibration is there for the other tensors' ranges."""
    assert recipe.trained is not None
    placement = place(onnx.load(source), recipe.policy, recipe.keep_float)
    trained.require_placed(placement, recipe.trained)
    found = apply(source, recipe, calibration, {name: float(scale) * 127 for name, scale in trained.scales.items()})
    scales, weight_scales = dict(trained.scales), dict(trained.weight_scales)
    model = write_qdq(onnx.load(source), found.placement, scales, weight_scales)
    return replace(found, model=model, scales=scales, weight_scales=weight_scales)


def search_identity(recipe: Quantization, device: str = "cpu") -> list[Any]:
    """What a search for weights or biases depends on beside the recipe, JSON values; empty where there is none."""
    if recipe.rounding == "nearest" and not recipe.bias_correction:
        return []
    import torch

    from alignment.quantize import reconstruction
    from alignment.quantize.adaround import Options

    options = asdict(Options(device=device))
    return [options, reconstruction.IMAGES, reconstruction.PLACES, reconstruction.WINDOW, torch.__version__]


def _improved(
    variant: Variant, found: Quantized, samples: Samples, progress: Progress | None, device: str
) -> Quantized:
    """The same with weights and biases that were searched for, once: they are kept in the cache."""
    import torch

    from alignment.quantize import reconstruction
    from alignment.quantize.adaround import Options
    from alignment.quantize.torch_model import float_detector, quantized_detector

    if device == "cuda" and not torch.cuda.is_available():
        raise AlignError(f"--device {device}: torch {torch.__version__} finds no GPU", "leave it at cpu")
    recipe, options = variant.quantization, Options(device=device)

    def search(folder: Path) -> None:
        better = reconstruction.improve(
            float_detector(variant, found.source),
            quantized_detector(variant, found),
            (sample.tensor[None] for sample in samples),
            recipe.rounding,
            recipe.bias_correction,
            options,
            (lambda done, total: progress(recipe.rounding, done, total)) if progress else None,
            folder / _UNITS,
        )
        units = [[unit.name, unit.nearest, unit.adaround] for unit in better.units]
        arrays = {f"weights/{name}": value for name, value in better.weights.items()}
        arrays |= {f"biases/{name}": value for name, value in better.biases.items()}
        with writing(folder / _WEIGHTS) as file, file.open("wb") as opened:
            np.savez_compressed(opened, units=np.array(json.dumps(units)), **arrays)  # type: ignore[arg-type]

    def read(folder: Path) -> dict[str, np.ndarray]:
        again = "delete it: it is made anew"
        return read_arrays(folder / _WEIGHTS, again, again, "no weights that were searched for")

    # Of unfinished work each unit is a file, read or made anew.
    key = _weights_key(variant, found, device)
    with resumable(key, lambda folder: (folder / _WEIGHTS).exists() and read(folder)) as folder:
        if not (folder / _WEIGHTS).is_file():
            search(folder)
        shutil.rmtree(folder / _UNITS, ignore_errors=True)
        improved = read(folder)
    parts: dict[str, dict[str, np.ndarray]] = {"weights": {}, "biases": {}}
    for name, array in improved.items():
        kind, _, initializer = name.partition("/")
        if initializer:
            parts[kind][initializer] = array
    model = with_weights(onnx.load(found.source), parts["weights"], parts["biases"])
    return replace(
        found,
        source=graph_file(model, f"{variant.name}.{recipe.rounding}"),
        model=write_qdq(model, found.placement, found.scales, found.weight_scales),
        units=tuple(Searched(*unit) for unit in json.loads(str(improved["units"]))),
    )


def _weights_key(variant: Variant, found: Quantized, device: str) -> Key:
    inputs, versions = _split(found.calibration.identity)
    inputs |= {
        "recipe": found.recipe.fingerprint(),
        "source_sha256": file_digest(found.source),
        "scales_sha256": digest_of({name: float(scale) for name, scale in found.scales.items()}),
        "search": search_identity(found.recipe, device),
    }
    return Key("weights", variant.name, inputs, versions)


def _split(identity: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What went in, and the versions of programs."""
    versions = {name: identity[name] for name in ("onnxruntime", "alignment")}
    return {name: value for name, value in identity.items() if name not in versions}, versions


def apply(
    source: Path, recipe: Quantization, calibration: Calibration, ranges: Mapping[str, float] | None = None
) -> Quantized:
    """The quantized graph that follows from a calibration; `ranges` go before what was calibrated.

    Raises:
        AlignError: for ranges of which no tensor of the graph has one, and for scales that int8 cannot have.
    """
    model = onnx.load(source)
    placement = place(model, recipe.policy, recipe.keep_float)
    amax = calibration.amax(recipe.method)
    if ranges is not None and not amax.keys() & ranges.keys():
        what = f"{source}: none of its tensors is among the {len(ranges)} ranges"
        raise AlignError(what, "give --ranges of this model")
    amax |= {name: value for name, value in (ranges or {}).items() if name in amax}
    amax |= group_amax(placement, amax)
    scales = {q.tensor: scale_of(amax[q.tensor]) for q in placement.activations}
    weights = {weight.name: weight for weight in model.graph.initializer}
    weight_scales = {
        q.initializer: scale_of(weight_amax(numpy_helper.to_array(weights[q.initializer]), q.axis, recipe.weights))
        for q in placement.weights
    }
    quantized = write_qdq(model, placement, scales, weight_scales)
    return Quantized(recipe, source, quantized, placement, amax, scales, weight_scales, calibration)


def with_weights(
    model: onnx.ModelProto, weights: Mapping[str, np.ndarray], biases: Mapping[str, np.ndarray]
) -> onnx.ModelProto:
    """A copy with other values: `weights` by initializer, `biases` by the node that adds them."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for initializer in changed.graph.initializer:
        if initializer.name in weights:
            initializer.CopyFrom(numpy_helper.from_array(weights[initializer.name], initializer.name))
    for node in changed.graph.node:
        if node.name in biases:
            # Under a name of its own: nodes may share one.
            own = f"{node.name}_bias"
            changed.graph.initializer.append(numpy_helper.from_array(biases[node.name], own))
            del node.input[2:]
            node.input.append(own)
    return changed


def graph_file(model: onnx.ModelProto, name: str) -> Path:
    """A graph as a file: in the cache, named by its content."""
    content = model.SerializeToString(deterministic=True)
    key, file = Key("graph", name, {"sha256": hashlib.sha256(content).hexdigest()}), f"{name}.onnx"
    return kept(key, lambda folder: (folder / file).write_bytes(content)) / file
