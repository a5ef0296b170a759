"""From a torch detector to one ONNX file that carries its own papers."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import onnx
from onnx import numpy_helper

from alignment import __version__
from alignment.cache import Key, kept
from alignment.errors import AlignError
from alignment.export.plugin_nms import before_plugin, plugin_of, require_boxes_of
from alignment.storage import writing
from alignment.variant import OnnxSource, Variant

INPUT = "images"
OPSETS = range(13, 18)
#: Of one tensor.
MOST_ELEMENTS = 2**28
_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
#: Of bare ONNX files.
OLDEST_OPSET = 11


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Attributes:
        opset: 13 to 17 (the TorchScript exporter's useful range for TensorRT 8.6 and later).
        batch: a fixed batch size, or None for a dynamic first axis.
        outputs: ``decoded`` (boxes, scores), ``raw`` (head outputs) or ``both``.
    """

    opset: int = 17
    batch: int | None = None
    outputs: Literal["both", "decoded", "raw"] = "both"

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise AlignError(f"opset {self.opset} is not supported", f"give one from {OPSETS[0]} to {OPSETS[-1]}")
        if self.batch is not None and self.batch < 1:
            raise AlignError(f"batch {self.batch} is not a batch size", "give 1 or more, or none for a dynamic batch")


@dataclass(frozen=True)
class ExportedModel:
    """An ONNX file and, beside it, its node map (absent for a bare ONNX source)."""

    onnx: Path
    node_map: Path | None

    @property
    def sha256(self) -> str:
        """Digest of the ONNX file, 64 hex digits."""
        return file_digest(self.onnx)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits.  Raises AlignError when it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise AlignError(f"{path}: {error.strerror}", "give the file that the variant's YAML names") from None


def exported(variant: Variant, options: ExportOptions | None = None) -> ExportedModel:
    """The variant's ONNX file: exported once and kept in the cache, or the bare file itself after a check.

    Raises:
        AlignError: for weights that are missing or do not fit, or a graph that is not valid.
    """
    options = options or ExportOptions()
    if isinstance(variant.source, OnnxSource):
        check_onnx(variant.source.file, variant.ends_in_nms)
        require_boxes_of(variant.source.file, variant.rotated)
        return ExportedModel(variant.source.file, None)
    weights = file_digest(variant.weights)
    inputs = {"variant": variant.fingerprint(), "weights_sha256": weights, "options": asdict(options)}
    key = Key("onnx", variant.name, inputs, _versions())
    path = kept(key, lambda folder: export(variant, folder, options)) / f"{variant.name}.onnx"
    return ExportedModel(path, node_map_path(path))


def node_map_path(path: Path) -> Path:
    """Where the node map of an ONNX file lies."""
    return path.with_suffix(".node_map.json")


def read_node_map(path: Path) -> dict[str, dict[str, str]]:
    """What export wrote beside a graph; see `alignment.export.node_map`."""
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def modules_of(path: Path) -> dict[str, str]:
    """Torch module of each node of an ONNX file, by the node map beside it; empty where there is none."""
    node_map = node_map_path(path)
    return {name: entry["module"] for name, entry in read_node_map(node_map).items()} if node_map.is_file() else {}


def export(variant: Variant, folder: Path, options: ExportOptions, stem: str | None = None) -> ExportedModel:
    """Writes ``<stem>.onnx`` and ``<stem>.node_map.json`` into `folder`; the ONNX appears last and whole.

    Args:
        stem: default: the variant's name.

    Raises:
        AlignError: for weights that are missing or do not fit.
    """
    from alignment.export.node_map import build_node_map
    from alignment.models.detector import fused
    from alignment.models.mmyolo_source import build_detector

    detector = fused(build_detector(variant))
    path = folder / f"{stem or variant.name}.onnx"
    with writing(path) as temporary:
        _trace(detector, variant, options, temporary)
        model = _simplify(onnx.load(temporary))
        if model.opset_import[0].version != options.opset:
            raise AlignError(
                f"{variant.name}: opset {options.opset} asked for, {model.opset_import[0].version} written"
            )
        node_map = build_node_map(model, detector)
        _add_papers(model, variant, options)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, temporary)
        with writing(node_map_path(path)) as beside:
            beside.write_text(json.dumps(node_map, indent=1) + "\n", encoding="utf-8")
    return ExportedModel(path, node_map_path(path))


def check_onnx(path: Path, plugin: bool = False) -> onnx.ModelProto:
    """Loads and checks an ONNX file; with `plugin`, one that ends in an NMS plugin up to there.

    Raises:
        AlignError: when it is missing, truncated, not ONNX, or uses an op or opset that ONNX does not know, a plugin of
            TensorRT's say.
    """
    mend, opset = "export it again", 0
    if not path.is_file():
        raise AlignError(f"{path}: no such file", "give the ONNX file that the variant's YAML names")
    try:
        model = onnx.load(path)
        if plugin and plugin_of(model) is not None:
            model = before_plugin(model, path)
        _refuse_plugins(model, path)
        # Before the checker, which of an old opset says only that some node has too many inputs.
        opset = _opset(model, path)
        onnx.checker.check_model(model)
        _require_values(model.graph)
        _require_room(model)
    except AlignError:
        raise
    except Exception as error:  # protobuf and checker have error types of their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        which = f" of opset {opset}" if opset else ""
        raise AlignError(f"{path}: not a valid ONNX model{which}: {reason}", mend) from None
    return model


def _require_values(graph: onnx.GraphProto) -> None:
    """Raises ValueError for a tensor that does not hold what its type and shape say; the checker looks at few."""
    for tensor in graph.initializer:
        try:
            numpy_helper.to_array(tensor)
        except Exception as error:
            raise ValueError(f"tensor {tensor.name}: {error}") from None
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                numpy_helper.to_array(attribute.t)
            for inner in (attribute.g, *attribute.graphs) if attribute.type in _GRAPHS else ():
                _require_values(inner)


def _require_room(model: onnx.ModelProto) -> None:
    """Raises ValueError for a tensor, of a shape that follows from the graph alone, that is larger than any has use of.

    The checker and ONNX Runtime would go as far as memory goes.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception:  # of what cannot be inferred nothing is known
        return
    for value in inferred.value_info:
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if min(sizes, default=0) > 0 and math.prod(sizes) > MOST_ELEMENTS:
            raise ValueError(f"tensor {value.name} of shape {sizes} takes more than {MOST_ELEMENTS >> 28} GB")


def _opset(model: onnx.ModelProto, path: Path) -> int:
    """The opset of a graph with nodes, where it is one that can be used here."""
    if not model.graph.node:
        raise AlignError(f"{path}: holds no nodes", "export it again")
    if not model.graph.output:
        raise AlignError(f"{path}: has no outputs", "export it again")
    opset: int = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    newest = onnx.defs.onnx_opset_version()
    if opset < OLDEST_OPSET:
        what = f"{path}: opset {opset}, but {OLDEST_OPSET} is the oldest that is supported here"
        raise AlignError(what, f"export it again with opset {OPSETS[0]} to {OPSETS[-1]}")
    if opset > newest:
        what = f"{path}: opset {opset}, but {newest} is the newest that onnx {onnx.__version__} knows"
        raise AlignError(what, f"export it again with opset {OPSETS[0]} to {OPSETS[-1]}")
    return opset


def _refuse_plugins(model: onnx.ModelProto, path: Path) -> None:
    plugins = sorted({node.op_type for node in model.graph.node if node.op_type.endswith("_TRT")})
    if plugins:
        raise AlignError(
            f"{path}: holds {', '.join(plugins)}, which only TensorRT runs, but the reference is ONNX Runtime",
            "export it up to its NMS (head layout decoded, yolov5 or yolov8), or with ONNX's own NonMaxSuppression; a "
            "file that ends in EfficientNMS_TRT takes head layout end2end",
        )


def _trace(detector, variant: Variant, options: ExportOptions, path: Path) -> None:
    import torch

    names = detector.output_names
    keep = {"both": slice(None), "decoded": slice(0, 2), "raw": slice(2, None)}[options.outputs]

    class Chosen(torch.nn.Module):
        """Only the outputs that were asked for, so that the others' branches are not exported."""

        def __init__(self) -> None:
            super().__init__()
            self.detector = detector

        def forward(self, image):
            return self.detector(image)[keep]

    image = torch.zeros(options.batch or 1, 3, variant.input.height, variant.input.width)
    dynamic = {name: {0: "batch"} for name in [INPUT, *names[keep]]} if options.batch is None else None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Chosen().eval(),
            (image,),
            str(path),
            input_names=[INPUT],
            output_names=names[keep],
            dynamic_axes=dynamic,
            opset_version=options.opset,
            dynamo=False,
        )


def _simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Folds constants and dead shapes; names of nodes with weights survive, `build_node_map` checks it."""
    import onnxslim

    slim = onnxslim.slim(model)
    return onnx.shape_inference.infer_shapes(slim, check_type=True, strict_mode=True)


def _add_papers(model: onnx.ModelProto, variant: Variant, options: ExportOptions) -> None:
    papers = {
        "variant": variant.name,
        "variant_fingerprint": variant.fingerprint(),
        "weights_sha256": file_digest(variant.weights),
        "preprocess": variant.preprocess.model_dump_json(),
        "export": json.dumps(asdict(options)),
        "versions": json.dumps(_versions()),
    }
    del model.metadata_props[:]
    for key, value in papers.items():
        model.metadata_props.add(key=f"alignment.{key}", value=value)
    model.producer_name, model.producer_version = "alignment", __version__


def _versions() -> dict[str, str]:
    import onnxslim
    import torch

    return {
        "alignment": __version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxslim": onnxslim.__version__,
    }
