"""Parts of a placement: some nodes in int8, at the scales of the whole; and what share of the work they are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_placement import graphs, reads, tiny

from alignment.errors import AlignError
from alignment.quantize.graph import OnnxGraph
from alignment.quantize.placement import place

TWO = "a = Conv(x, w0)\nb = Conv(a, w1)\nc = Concat<axis = 1>(a, b)\nd = Conv(c, w2)\ne = Relu(d)"
WEIGHTS = {"w2": (32, 64, 1, 1)}


def test_a_node_alone() -> None:
    placement = place(tiny(TWO, **WEIGHTS), "full")
    assert placement.int8_nodes == ("a", "b", "c", "d")
    alone = placement.restricted({"b"})
    assert reads(alone) == {"a": ["b"]}
    assert [quantizer.node for quantizer in alone.weights] == ["b"]
    of_b = next(quantizer for quantizer in placement.activations if quantizer.tensor == "a")
    assert alone.activations[0].group == of_b.group


@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_activations_or_weights(activations: bool, weights: bool) -> None:
    alone = place(tiny(TWO, **WEIGHTS), "full").restricted({"a", "d"}, activations, weights)
    assert len(alone.activations) == 2 * activations
    assert [quantizer.node for quantizer in alone.weights] == ["a", "d"] * weights


@given(model=graphs(), data=st.data())
def test_parts_make_the_whole(model, data) -> None:
    whole = place(model, "full")
    nodes = whole.int8_nodes
    some = set(data.draw(st.lists(st.sampled_from(nodes), unique=True))) if nodes else set()
    parts = [whole.restricted(some), whole.restricted(set(nodes) - some)]
    assert whole.restricted(nodes) == whole
    assert set(parts[0].int8_nodes) == some
    slots = [(q.tensor, *reader) for part in parts for q in part.activations for reader in q.readers]
    assert sorted(slots) == sorted((q.tensor, *reader) for q in whole.activations for reader in q.readers)
    assert len(parts[0].weights) + len(parts[1].weights) == len(whole.weights)


@pytest.mark.parametrize(
    ("text", "weights", "macs"),
    [
        ("a = Conv(x, w0)", {}, 32 * 32 * 64),
        ("a = Conv<pads = [1, 1, 1, 1], group = 32>(x, w0)", {"w0": (32, 1, 3, 3)}, 32 * 9 * 64),
        ("a = Conv<strides = [2, 2]>(x, w0)", {"w0": (16, 32, 2, 2)}, 16 * 32 * 4 * 16),
        ("a = ConvTranspose<strides = [2, 2]>(x, w0)", {"w0": (32, 16, 2, 2)}, 32 * 16 * 4 * 64),
        ("a = Relu(x)", {}, 0),
    ],
)
def test_multiplications(text: str, weights: dict[str, tuple[int, ...]], macs: int) -> None:
    graph = OnnxGraph(tiny(text, **weights))
    assert graph.macs(graph.nodes[0]) == macs


def test_multiplications_of_a_matrix() -> None:
    graph = OnnxGraph(tiny("p = GlobalAveragePool(x)\nf = Flatten(p)\na = Gemm(f, w0)", w0=(32, 10)))
    assert graph.macs(graph.nodes[-1]) == 320


def test_a_size_that_is_not_known() -> None:
    model = tiny("a = Conv(x, w0)")
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "h"
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    with pytest.raises(AlignError, match="fixed height and width"):
        OnnxGraph(model).macs(model.graph.node[0])
