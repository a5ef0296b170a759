"""Every TensorRT name that this package uses exists in 8.6, 10 and 11, or is asked for behind a capability.

TensorRT itself is not needed: its names were read from the real bindings into ``golden/trt_api``.  `trt_uses` finds the
uses; a TensorRT object under a name that says nothing is a fault too.  A second net does not ask whose an attribute is:
a name that any class has in one version and none in another needs a capability, or a reason, so that no call escapes.
"""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from trt_faults import APIS, COMING_AND_GOING, NAMESAKES, OPAQUE, SOURCES, exists, faults, unguarded
from trt_uses import imports_tensorrt, names, uses

from alignment.engine import build, capabilities, log
from alignment.engine.build import BuildOptions, cached_engine
from alignment.engine.capabilities import BEHIND, Capabilities, Gpu
from alignment.engine.int8 import CalibrationImages
from alignment.engine.log import Log, Message, warnings_of
from alignment.errors import AlignError, BuildError
from alignment.runners import tensorrt


def test_listing_is_there():
    assert list(APIS) == ["10.16.1", "11.4.0", "8.6.1"]
    assert all(len(api) > 150 for api in APIS.values())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_names_exist_or_are_guarded(path: Path):
    assert faults(SOURCES[path]) == []
    assert unguarded(SOURCES[path]) == []


def test_every_namesake_is_met():
    met = {use.text for source in SOURCES.values() for use in names(source) if use.name in COMING_AND_GOING}
    assert set(NAMESAKES) <= met


def test_uses_are_found():
    assert {path.name for path, source in SOURCES.items() if imports_tensorrt(ast.parse(source))} == {
        *("build.py", "capabilities.py", "execute.py", "int8.py", "log.py", "registry.py", "tensorrt.py")
    }
    names = {use.name for source in SOURCES.values() for use in uses(source, OPAQUE)}
    expected = {"Builder.build_serialized_network", "BuilderFlag.TF32", "IBuilderConfig.builder_optimization_level"}
    assert expected | {"IExecutionContext.execute_async_v3", "ICudaEngine.get_tensor_name", "nptype"} <= names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_tensorrt_and_pycuda_are_imported_lazily(path: Path):
    tree = ast.parse(SOURCES[path])
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] in ("tensorrt", "pycuda"):
                    assert id(node) in inside, f"line {node.lineno}"
                    assert name.name != "tensorrt" or name.asname == "trt", f"line {node.lineno}: name it trt"
        assert not (isinstance(node, ast.ImportFrom) and node.module in ("tensorrt", "pycuda"))


@pytest.mark.parametrize("version", APIS)
@pytest.mark.parametrize("name", BEHIND)
def test_capability_is_true_exactly_where_the_name_exists(name: str, version: str):
    assert getattr(Capabilities.of(version), BEHIND[name]) is exists(APIS[version], name)


@pytest.mark.parametrize(
    ("version", "candidates", "class_agnostic", "routes"),
    [
        ("8.4.3.1", 4096, False, ("implicit", "dynamic_range", "qdq")),
        ("8.5.1", 5000, False, ("implicit", "dynamic_range", "qdq")),
        ("8.6.1.post1", 5000, False, ("implicit", "dynamic_range", "qdq")),
        ("10.16.1.11", 5000, True, ("implicit", "dynamic_range", "qdq")),
        ("11.4.0.106", 5000, True, ("qdq",)),
    ],
)
def test_capabilities_by_version(version, candidates, class_agnostic, routes):
    ability = Capabilities.of(version)
    assert (ability.nms_candidates, ability.nms_class_agnostic) == (candidates, class_agnostic)
    assert ability.int8_routes == routes
    assert ability.topk_limit == 3840
    assert ability.supported is not version.startswith(("8.4", "8.5"))
    assert ability.always_strongly_typed is version.startswith("11")


def test_no_version():
    with pytest.raises(AlignError, match=r"'new' is no TensorRT version"):
        Capabilities.of("new")


@pytest.mark.parametrize("absent", ["tensorrt", "pycuda"])
def test_missing_names_the_package_and_the_mend(monkeypatch, absent):
    monkeypatch.setattr(capabilities.importlib.util, "find_spec", lambda name: None if name == absent else object())
    if absent == "pycuda":
        monkeypatch.setattr(capabilities, "_missing_tensorrt", lambda: None)
    assert capabilities.missing().startswith(f"{absent} is not installed: pip install ")
    with pytest.raises(AlignError, match=f"{absent} is not installed"):
        capabilities.require()


# Wording of TensorRT 8.6 and 10, as quoted in public issues and as seen by this project.
CLIPPED = "- 19 weights are affected by this issue: Detected values which are outside of int8_t range and clipped them"
SUBNORMAL = "- 59 weights are affected by this issue: Detected subnormal FP16 values."
INT64 = "onnx2trt_utils.cpp:366: Your ONNX model has been generated with INT64 weights, while TensorRT does not"
SCALE = "Missing scale and zero-point for tensor {}, expect fall back to non-int8 implementation for any layer"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("weights out of range", CLIPPED),
        ("weights out of range", SUBNORMAL),
        ("weights clamped", "onnx2trt_utils.cpp:392: One or more weights outside the range of INT32 was clamped"),
        ("int64 cast", INT64),
        ("missing scale", SCALE.format("768")),
        ("no implementation", "10: [optimizer.cpp] Could not find any implementation for node {ForeignNode[a...b]}."),
        ("TopK limit", "topk: K exceeds the maximum value allowed (3840)"),
        ("Myelin", "2: [myelinCache.h] Error Code 2: Internal Error (Myelin error)"),
        ("tactic failed", "Skipping tactic 0x0000000000000003 due to insufficient memory"),
        ("plugin not found", "3: getPluginCreator could not find plugin: Round version: 1"),
        ("deprecated", "The setting FP16 is deprecated in favour of strong typing"),
    ],
)
def test_log_filter_knows(kind: str, text: str):
    (line,) = warnings_of([("WARNING", text)])
    assert line.startswith(f"{kind}: ")
    assert ".cpp:3" not in line


def test_log_filter_leaves_chatter_out_and_errors_in():
    chatter = [
        ("INFO", "[MemUsageChange] Init CUDA: CPU +323, GPU +0, now: CPU 390, GPU 235 (MiB)"),
        ("INFO", "No importer registered for op: EfficientNMS_TRT. Attempting to import as plugin."),
        ("INFO", "Successfully created plugin: EfficientNMS_TRT"),
        ("WARNING", "If this is not the desired behavior, please modify the weights or retrain"),
        ("WARNING", "Check verbose logs for the list of affected weights."),
    ]
    assert warnings_of(chatter) == []
    assert warnings_of([*chatter, ("ERROR", "4: something\nnew")]) == ["error: 4: something new"]


def test_log_filter_repeats_nothing():
    assert len(warnings_of([("WARNING", INT64)] * 5)) == 1
    assert len(warnings_of([("WARNING", CLIPPED), ("WARNING", SUBNORMAL)])) == 2
    (line,) = warnings_of([("WARNING", SCALE.format(index)) for index in range(300)])
    assert "tensor 0," in line
    assert line.endswith("(and 299 more of this kind)")
    (line,) = warnings_of([("ERROR", "x" * 5000)])
    assert len(line) < 320


def test_log_hears_only_while_it_listens(monkeypatch):
    monkeypatch.setattr(log, "_logger", lambda: None)
    outer, inner = Log(), Log()
    log.receive("ERROR", "before")
    with log.listening(outer):
        log.receive("VERBOSE", "Tactic: 0x1 Time: 0.1")
        with log.listening(inner):
            log.receive("VERBOSE", "List of affected weights: conv1.weight")
        log.receive("ERROR", "after")
    assert [message.text for message in inner.messages] == ["List of affected weights: conv1.weight"]
    assert [message.severity for message in outer.messages] == ["VERBOSE", "ERROR"]
    assert outer.errors() == ["after"]


def test_fingerprint_depends_on_every_field():
    base = BuildOptions(max_batch=4)
    assert base.fingerprint() == BuildOptions(max_batch=4).fingerprint()
    other = {
        "precision": "tf32",
        "strongly_typed": True,
        "float32_nodes": ("a",),
        "float16_nodes": ("a",),
        "ranges": (("a", 1.0),),
        "calibrator": "minmax",
        "cache": "TRT-8601-MinMaxCalibration",
        "min_batch": 2,
        "opt_batch": 2,
        "max_batch": 8,
        "optimization_level": 3,
        "workspace": 1 << 20,
        "layers_as_outputs": ("a",),
    }
    assert set(other) == {field.name for field in dataclasses.fields(BuildOptions)}
    start = BuildOptions(min_batch=1, opt_batch=2, max_batch=4)
    changed = [dataclasses.replace(start, **{k: 3 if k == "opt_batch" else v}) for k, v in other.items()]
    assert len({options.fingerprint() for options in [start, *changed]}) == len(other) + 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"precision": "int9"},
        {"opt_batch": 3, "max_batch": 2},
        {"min_batch": 0},
        {"optimization_level": 6},
        {"workspace": 0},
    ],
    ids=str,
)
def test_wrong_options(wrong):
    with pytest.raises(AlignError):
        BuildOptions(**wrong)


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, 8, 8])
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["y"])], "g", [image], [answer])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph), path)
    return path


@pytest.fixture
def built(monkeypatch, tmp_path: Path) -> list[BuildOptions]:
    """A machine that pretends to build engines; the list tells which it built."""
    calls: list[BuildOptions] = []

    def build_engine(path: Path, options: BuildOptions, log: Log, images: CalibrationImages | None = None) -> bytes:
        calls.append(options)
        if images:
            images.cache = f"cache {len(calls)}"
        log.add("WARNING", "a message")
        return f"engine {len(calls)}".encode()

    for name in build.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "require", lambda: None)
    monkeypatch.setattr(build, "gpu", lambda: Gpu("H200", "9.0", "13.0"))
    monkeypatch.setattr(Capabilities, "current", classmethod(lambda cls: cls("8.6.1")))
    monkeypatch.setattr(build, "build_engine", build_engine)
    return calls


def test_engine_is_built_once(onnx_file, built):
    first, again = cached_engine(onnx_file, BuildOptions()), cached_engine(onnx_file, BuildOptions())
    assert len(built) == 1
    assert first == (b"engine 1", [Message("WARNING", "a message")], False)
    assert again == first._replace(from_cache=True)


def test_an_engine_of_other_images_is_another_and_a_kept_one_brings_its_calibration_cache(onnx_file, built):
    options = BuildOptions(precision="int8", calibrator="minmax")
    for identity, cache in (("a", "cache 1"), ("b", "cache 2"), ("a", "cache 1")):
        images = CalibrationImages(identity, lambda: iter(()))
        cached_engine(onnx_file, options, images)
        assert images.cache == cache
    assert len(built) == 2


@pytest.mark.parametrize("change", ["options", "file", "version", "gpu", "variable"])
def test_engine_is_built_anew_after_a_change(onnx_file, built, monkeypatch, change):
    options = BuildOptions()
    cached_engine(onnx_file, options)
    if change == "options":
        options = BuildOptions(precision="fp16")
    elif change == "file":
        model = onnx.load(onnx_file)
        model.graph.node[0].op_type = "Sigmoid"
        onnx.save(model, onnx_file)
    elif change == "version":
        monkeypatch.setattr(Capabilities, "current", classmethod(lambda cls: cls("10.16.1")))
    elif change == "gpu":
        monkeypatch.setattr(build, "gpu", lambda: Gpu("H100", "9.0", "13.0"))
    else:
        monkeypatch.setenv(build.NO_CUBLAS, "1")
    assert cached_engine(onnx_file, options).plan == b"engine 2"


def test_a_truncated_engine_is_refused_and_built_anew(onnx_file, built, caplog):
    cached_engine(onnx_file, BuildOptions())
    (build.engine_key(onnx_file, BuildOptions()).folder / "engine.plan").write_bytes(b"eng")
    assert cached_engine(onnx_file, BuildOptions()).plan == b"engine 2"
    assert cached_engine(onnx_file, BuildOptions()).plan == b"engine 2"
    (line,) = (record.getMessage() for record in caplog.records)
    assert "is refused: engine.plan has 3 bytes, 8 were written" in line


def test_a_kept_engine_that_tensorrt_cannot_load_is_refused_once(onnx_file, built, caplog, monkeypatch):
    loaded: list[bytes] = []

    def load(self, plan: bytes) -> None:
        loaded.append(plan)
        if plan == b"engine 1":
            raise tensorrt._UnloadableError("x.onnx: TensorRT cannot load its engine: another driver")

    cached_engine(onnx_file, BuildOptions())
    monkeypatch.setattr(tensorrt.TensorRTRunner, "_load", load)
    monkeypatch.setattr(tensorrt.TensorRTRunner, "_provenance", lambda self, options, plan, from_cache: from_cache)
    assert tensorrt.TensorRTRunner(onnx_file, BuildOptions()).provenance is False
    assert loaded == [b"engine 1", b"engine 2"]
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.endswith("is refused: x.onnx: TensorRT cannot load its engine: another driver: it is made anew")
    assert tensorrt.TensorRTRunner(onnx_file, BuildOptions()).provenance is True
    # One that is fresh, and cannot be loaded, is no fault of the cache.
    monkeypatch.setattr(tensorrt.TensorRTRunner, "_load", lambda self, plan: load(self, b"engine 1"))
    with pytest.raises(AlignError, match="another driver"):
        tensorrt.TensorRTRunner(onnx_file, BuildOptions(precision="fp16"))


def test_external_weights_belong_to_the_key(onnx_file, built):
    model = onnx.load(onnx_file)
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3], b"\0" * 12, raw=True)
    model.graph.initializer.append(weight)
    onnx.save(model, onnx_file, save_as_external_data=True, location="weights.bin", size_threshold=0)
    cached_engine(onnx_file, BuildOptions())
    (onnx_file.parent / "weights.bin").write_bytes(b"\1" * 12)
    cached_engine(onnx_file, BuildOptions())
    assert len(built) == 2


def test_failed_build_leaves_nothing(onnx_file, built, monkeypatch, tmp_path):
    def fails(*_):
        raise AlignError("no")

    monkeypatch.setattr(build, "build_engine", fails)
    with pytest.raises(AlignError):
        cached_engine(onnx_file, BuildOptions())
    assert not list((tmp_path / "cache").glob("entries/*/*"))


def test_not_an_onnx_file(built, tmp_path):
    path = tmp_path / "weights.onnx"
    path.write_bytes(b"\xff\xff\xff no protobuf")
    with pytest.raises(AlignError, match=r"weights\.onnx: not an ONNX file"):
        cached_engine(path, BuildOptions())
    with pytest.raises(AlignError, match=r"absent\.onnx"):
        cached_engine(tmp_path / "absent.onnx", BuildOptions())


@pytest.mark.parametrize(
    ("text", "kind", "mend"),
    [
        ("outScales.size() == 1", BuildError, "look that node up"),
        ("Cuda Runtime (out of memory)", AlignError, "free the GPU"),
    ],
)
def test_memory_that_ran_out_is_no_fault_of_the_graph(text, kind, mend):
    """A search for culprits keeps for good of which graphs no engine comes."""
    log = Log()
    log.add("ERROR", text)
    error = build._build_error(Path("a.onnx"), Capabilities.of("8.6.1"), log)
    assert type(error) is kind
    assert str(error).startswith(f"a.onnx: TensorRT 8.6.1 cannot build it: {text}: ")
    assert mend in error.mend
