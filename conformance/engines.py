"""Engines for tests: written by hand in the inspector's own words, or simulated from a QDQ graph."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import numpy_helper
from test_placement import tiny

from alignment.inspection.node_graph import NodeGraph
from alignment.inspection.saved import Inspection
from alignment.quantize.graph import QUANTIZING
from alignment.quantize.placement import PolicyName, place
from alignment.quantize.qdq import write_qdq

#: Two convolutions with a SiLU between them, in the notation of `test_placement.tiny`.
SILU = "c = Conv(x, w0); s = Sigmoid(c); m = Mul(c, s); d = Conv(m, w1)"
#: Type → how TensorRT 8.6 writes it.
WORDS = {
    "Int8": "Thirty-two wide channel vectorized row major Int8 format",
    "Half": "Channel major FP16 format where channel % 8 == 0",
    "Float": "Row major linear FP32",
}


def tensor(text: str) -> dict:
    """``name:Int8``, or ``name:Int8:layout`` in other words than `WORDS`."""
    name, kind, *layout = text.split(":")
    words = f"{layout[0]} {kind} format" if layout else WORDS[kind]
    return {"Name": name, "Location": "Device", "Dimensions": [1, 32, 8, 8], "Format/Datatype": words}


def layer(
    name: str, kind: str, reads: str, writes: str, nodes: Sequence[str] | None = None, weights: str = "", **more: object
) -> dict:
    """A layer as the inspector tells it; `reads` and `writes` are tensors, see `tensor`, parted by spaces."""
    listed = {
        "Name": name,
        "LayerType": kind,
        "Inputs": [tensor(text) for text in reads.split()],
        "Outputs": [tensor(text) for text in writes.split()],
        "TacticValue": "0x0000000000000001",
        "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in ([name] if nodes is None else nodes)),
        **more,
    }
    return listed | ({"Weights": {"Type": weights, "Count": 1024}} if weights else {})


def convolution(name: str, reads: str, writes: str, nodes: Sequence[str] | None = None, weights: str = "Int8") -> dict:
    """A convolution, in int8 unless its weights are of another type."""
    return layer(name, "CaskConvolution", reads, writes, nodes, weights, ParameterType="Convolution")


def reformat(name: str, reads: str, writes: str, origin: str = "REFORMAT") -> dict:
    """A Reformat that TensorRT put in, or made of a quantizer."""
    return layer(name, "Reformat", reads, writes, (), Origin=origin)


def engine(*layers: dict, graph: onnx.ModelProto | None = None, times: dict[str, float] | None = None) -> Inspection:
    """What the inspector would tell of an engine of these layers."""
    nodes = NodeGraph((), (), ()) if graph is None else NodeGraph.of(graph)
    text = json.dumps({"Layers": list(layers), "Bindings": []}).replace("\\u001e", "\x1e")
    return Inspection("planted", text, times or {}, nodes, nodes.wanted_int8)


def quantized(model: onnx.ModelProto, policy: PolicyName = "full", keep_float: Sequence[str] = ()) -> onnx.ModelProto:
    """The QDQ graph of a placement, every scale 1."""
    placement = place(model, policy, keep_float)
    weights = {value.name: numpy_helper.to_array(value).shape for value in model.graph.initializer}
    return write_qdq(
        model,
        placement,
        {quantizer.tensor: np.float32(1) for quantizer in placement.activations},
        {q.initializer: np.ones(weights[q.initializer][q.axis], np.float32) for q in placement.weights},
    )


def simulated(model: onnx.ModelProto, name: str = "simulated") -> Inspection:
    """An engine that fuses nothing: a layer a node, a Reformat for each Q and DQ, constants folded."""
    graph = NodeGraph.of(model)
    layers = []
    for node in graph.nodes:
        read = [text for text in node.inputs if text in graph.varying]
        if not read:
            continue
        if node.op in QUANTIZING:
            kinds = ("Float", "Int8") if node.op == "QuantizeLinear" else ("Int8", "Float")
            layers.append(reformat(node.name, f"{read[0]}:{kinds[0]}", f"{node.outputs[0]}:{kinds[1]}", "QDQ"))
        else:
            kind = "CaskConvolution" if node.op == "Conv" else node.op
            inputs = " ".join(f"{text}:Float" for text in read)
            weights = {"Conv": "Int8" if node.name in graph.wanted_int8 else "Float"}.get(node.op, "")
            outputs = " ".join(f"{text}:Float" for text in node.outputs)
            layers.append(layer(node.name, kind, inputs, outputs, None, weights))
    made = engine(*layers, graph=model, times={one["Name"]: 0.001 * (1 + i % 7) for i, one in enumerate(layers)})
    return Inspection(name, made.text, made.times, made.graph, made.wanted)


def clean() -> Inspection:
    """Two convolutions in int8, nothing between them."""
    return engine(
        reformat("x_QuantizeLinear", "x:Float", "x_quantized:Int8", "QDQ"),
        convolution("c + PWN(s, m)", "x_quantized:Int8", "m_quantized:Int8", ("c", "s", "m")),
        convolution("d", "m_quantized:Int8", "d:Float"),
        graph=quantized(tiny(SILU)),
    )
