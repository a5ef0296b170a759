"""EfficientNMSRotated_TRT compiled: for each GPU, against TensorRT's headers, and as a part of an engine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from rotated_kernels import COMPILER, NAMES, attributes, emulated, expected, filled, same, scene

from alignment.doctor import examine
from alignment.engine import plugins
from alignment.engine.capabilities import Capabilities, missing
from alignment.errors import AlignError

pytestmark = [pytest.mark.nms, pytest.mark.rotated, pytest.mark.plugin]
NVCCS = list({nvcc.resolve(): nvcc for nvcc in plugins.nvccs()}.values()) if COMPILER else []
PTX = (80, 89, 90, 100, 120)
KERNELS = {"filter": 2, "sort_tiles": 1, "rank_scores": 2, "rank_groups": 2, "settle_tiles": 2, "write_output": 2}
without_nvcc = pytest.mark.skip(reason="no nvcc: pip install '.[plugin]', beside a C++ compiler")


@pytest.fixture(
    params=NVCCS or [pytest.param(None, marks=without_nvcc)],
    ids=lambda nvcc: "wheel" if "nvidia" in str(nvcc) else "system",
)
def nvcc(request, monkeypatch) -> Path:
    """Each of CUDA's compilers, as if it were the only one."""
    monkeypatch.setattr(plugins, "nvccs", lambda: iter([request.param]))
    return request.param


@pytest.fixture
def headers() -> Path:
    try:
        return plugins.find_tensorrt_headers()
    except AlignError as error:
        pytest.skip(str(error))


def test_ptx_for_every_gpu(nvcc, tmp_path):
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    wanted = [number for number in PTX if f"compute_{number}" in known.split()]
    assert wanted[:3] == [80, 89, 90]
    code = [f"-gencode=arch=compute_{number},code=compute_{number}" for number in wanted]
    source = plugins.source_dir() / "efficient_nms_rotated.cu"
    keep = ["-keep", f"-keep-dir={tmp_path}", "-fatbin", f"-o={tmp_path / 'all.fatbin'}"]
    subprocess.run([nvcc, "-std=c++17", "-O3", *code, *keep, source], check=True)
    texts = [path.read_text() for path in tmp_path.glob("*.ptx")]
    assert sorted(int(number) for text in texts for number in re.findall(r"^\.target sm_(\d+)", text, re.M)) == wanted
    for text in texts:
        entries = re.findall(r"\.entry (\w+)", text)
        assert {name: sum(name in entry for entry in entries) for name in KERNELS} == KERNELS
        # The error bound is that of IEEE arithmetic, and blocks hand over what is settled in one piece.
        assert "div.rn.f32" in text
        assert not re.search(r"(sin|cos|div|rcp|sqrt)\.approx[.\w]*\.f32|\.ftz\.f32", text)
        assert "ld.volatile.global.u64" in text
        assert "st.volatile.global.u64" in text


def test_the_library_of_the_kernels_is_compiled_once_and_loads(nvcc, tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(plugins, "ARCHITECTURES", (90,))
    path = plugins.build_kernels()
    written = path.stat().st_mtime_ns
    assert plugins.build_kernels() == path
    assert path.stat().st_mtime_ns == written
    (boxes, _), library = scene(0, 1, 500, 1, side=20), plugins.kernels(path)
    pairs = boxes[0, :-1], boxes[0, 1:]
    np.testing.assert_allclose(library.ious(*pairs).iou, emulated().ious(*pairs).iou, rtol=0, atol=1e-6)
    params = plugins.Params.of(attributes())
    assert library.workspace_bytes(params, (8, 21504, 15), np.float32) > 8 * 21504 * 15 * 8
    with pytest.raises(AlignError, match="efficient_nms_rotated: a pointer is null: see"):
        library.run(params, (1, 10, 2), np.float32, (0, 0, 0, 0, 0, 0), (0, 0))


def test_the_plugin_compiles_against_the_headers(nvcc, headers, tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(plugins, "ARCHITECTURES", (90,))
    library = plugins.build_plugin()
    listed = subprocess.run(["nm", "-D", library], check=True, capture_output=True, text=True).stdout
    assert {"enr_run", "enr_check"} <= set(re.findall(r" T (\w+)$", listed, re.M))
    # All else it brings along, but for what the process has that loads it.
    assert set(re.findall(r" U (\w+)$", listed, re.M)) == {"getLogger", "getPluginRegistry"}


def test_the_creator_and_what_an_engine_holds(headers, tmp_path):
    """tests/test_plugin.cpp: attributes, serialization, types, and a run on the CPU."""
    if not NVCCS:
        pytest.skip("no nvcc, beside which CUDA's headers are")
    library, program = plugins.build_for_cpu(), tmp_path / "test_plugin"
    source = plugins.source_dir() / "tests" / "test_plugin.cpp"
    link = [library, f"-Xlinker=-rpath={library.parent}", "-cudart=none"]
    subprocess.run([NVCCS[0], "-std=c++17", f"-isystem={headers}", source, *link, "-o", program], check=True)
    said = subprocess.run([program], capture_output=True, text=True).stdout.splitlines()
    assert said[-1:] == ["all ok"], said
    assert len(said) > 30


def test_without_nvcc_one_line_says_so(monkeypatch):
    monkeypatch.setattr(plugins.shutil, "which", lambda name: None)
    monkeypatch.setattr(plugins.importlib.util, "find_spec", lambda name: None)
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(AlignError, match=r"^nvcc is not found: install the CUDA toolkit and set CUDA_HOME, or pip"):
        plugins.build_kernels()
    with pytest.raises(AlignError, match=r"^no C\+\+ compiler is found: install g\+\+, or set CXX$"):
        plugins.build_for_cpu()


def test_nvcc_is_found_below_cuda_home(monkeypatch, tmp_path):
    monkeypatch.setattr(plugins.shutil, "which", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert plugins.find_nvcc() == tmp_path / "bin" / "nvcc"


def test_without_headers_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    with pytest.raises(AlignError, match=rf"^TENSORRT_ROOT {tmp_path}: no NvInfer.h: set TENSORRT_ROOT to"):
        plugins.build_plugin()
    monkeypatch.delenv("TENSORRT_ROOT")
    monkeypatch.setattr(plugins, "_HEADERS", (str(tmp_path),))
    with pytest.raises(AlignError, match=r"^TensorRT's headers are not found: set TENSORRT_ROOT to the folder"):
        plugins.build_plugin()


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "#define NV_TENSORRT_MAJOR 8 //!< Major.\n#define NV_TENSORRT_MINOR 6\n#define NV_TENSORRT_PATCH 1\n",
            "8.6.1",
        ),
        (
            "#define TRT_MAJOR_ENTERPRISE 10\n#define TRT_MINOR_ENTERPRISE 16\n#define TRT_PATCH_ENTERPRISE 0\n"
            "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE\n#define NV_TENSORRT_MINOR TRT_MINOR_ENTERPRISE\n"
            "#define NV_TENSORRT_PATCH TRT_PATCH_ENTERPRISE\n",
            "10.16.0",
        ),
    ],
)
def test_the_version_of_headers(text, version, tmp_path):
    (tmp_path / "NvInferVersion.h").write_text(text)
    assert plugins.headers_version(tmp_path) == version


@pytest.mark.parametrize("version", ["8.6.1", "10.16.0"])
def test_headers_of_another_tensorrt_are_not_loaded_into_it(version, monkeypatch, tmp_path):
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    monkeypatch.setattr(Capabilities, "current", lambda: Capabilities.of("10.3.0"))
    monkeypatch.setattr(plugins, "build_plugin", lambda: tmp_path / "built")
    monkeypatch.setattr(plugins, "_loaded", lambda path: path)
    (tmp_path / "NvInfer.h").touch()
    with pytest.raises(AlignError, match=rf"^{tmp_path}/NvInferVersion.h: No such file or directory: copy all of"):
        plugins.load_plugin()
    parts = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    (tmp_path / "NvInferVersion.h").write_text("".join(f"#define NV_TENSORRT_{k} {v}\n" for k, v in parts))
    if version == "8.6.1":
        with pytest.raises(AlignError, match=r"headers of TensorRT 8\.6\.1, but 10\.3\.0 is installed: set TENSORRT_"):
            plugins.load_plugin()
    else:
        assert plugins.load_plugin().name == "built"


def test_a_compiler_that_does_not_run_gives_one_line(monkeypatch, tmp_path):
    (tmp_path / "nvcc").write_text("no program")
    monkeypatch.setattr(plugins, "nvccs", lambda: iter([tmp_path / "nvcc"]))
    with pytest.raises(AlignError, match=rf"^{tmp_path}/nvcc: Permission denied: name a compiler that runs"):
        plugins.build_kernels()


def test_headers_that_are_too_old_are_named(nvcc, monkeypatch, tmp_path):
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    monkeypatch.setattr(plugins, "PLUGIN_SOURCES", ("plugin/plugin.cpp",))
    (tmp_path / "NvInfer.h").touch()
    version = "#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR 5\n#define NV_TENSORRT_PATCH 3\n"
    (tmp_path / "NvInferVersion.h").write_text(version)
    with pytest.raises(AlignError, match=r"TensorRT 8\.6 or newer is needed") as caught:
        plugins.build_plugin()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_sources_that_do_not_compile_give_one_line_and_leave_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plugins, "source_dir", lambda: tmp_path)
    monkeypatch.setattr(plugins, "KERNEL_SOURCES", ("wrong.cu",))
    (tmp_path / "wrong.cu").write_text("int first = missing;\nint second = missing;\n")
    with pytest.raises(AlignError, match=r"wrong.cu:1.*error.*missing") as caught:
        plugins.build_for_cpu()
    assert len(str(caught.value).splitlines()) == 1
    assert not list((tmp_path / "cache").rglob("*.so"))


without_cmake = pytest.mark.skipif(
    not all(map(shutil.which, ("cmake", "nvcc", "ninja"))), reason="no cmake, ninja or nvcc"
)


@without_cmake
def test_cmake_takes_the_headers_of_the_folder_that_is_named(tmp_path):
    """Not those of the system, nor those of an earlier call."""
    (tmp_path / "with" / "include").mkdir(parents=True)
    (tmp_path / "with" / "include" / "NvInfer.h").touch()
    (tmp_path / "without").mkdir()
    command = ["cmake", "-S", plugins.source_dir(), "-B", tmp_path / "b", "-G", "Ninja"]
    for name, fails in [("with", False), ("without", True)]:
        options = ["-DCMAKE_CUDA_ARCHITECTURES=90", f"-DTENSORRT_ROOT={tmp_path / name}"]
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        assert ("NvInfer.h not found" in done.stderr) == bool(done.returncode) == fails, done.stderr


@without_cmake
def test_cmake_says_what_it_misses(tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORRT_ROOT", raising=False)
    if any((Path(folder) / "NvInfer.h").exists() for folder in plugins._HEADERS):
        pytest.skip("the system has TensorRT's headers")
    command = ["cmake", "-S", plugins.source_dir(), "-B", tmp_path, "-G", "Ninja", "-DCMAKE_CUDA_ARCHITECTURES=90"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode
    assert "NvInfer.h not found: give -DTENSORRT_ROOT=DIR" in " ".join(done.stderr.split())
    assert not subprocess.run([*command, "-DPLUGIN=OFF"], capture_output=True).returncode


def test_doctor_says_what_compiles_the_plugin(monkeypatch, tmp_path):
    def told() -> dict[str, tuple[str, str]]:
        return {finding.what: (finding.state, finding.detail) for finding in examine()}

    (tmp_path / "NvInfer.h").touch()
    (tmp_path / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 8\n")
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    monkeypatch.setattr(plugins, "nvccs", lambda: iter([Path("some/nvcc")]))
    assert told()["nvcc"] == ("ok", "some/nvcc")
    assert told()["tensorrt headers"] == ("ok", f"8.?.? in {tmp_path}")
    monkeypatch.setattr(plugins, "nvccs", lambda: iter([]))
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path / "nowhere"))
    assert told()["nvcc"][0] == told()["tensorrt headers"][0] == "missing"
    assert "CUDA_HOME" in told()["nvcc"][1]


CLASSES, MOST = 3, 60


def model(kind: type, changed: dict) -> bytes:
    """A graph of the node alone, whose batch and number of boxes are open."""
    real = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    value = helper.make_tensor_value_info
    shapes = [["batch", 1], ["batch", MOST, 5], ["batch", MOST], ["batch", MOST]]
    types = [TensorProto.INT32, real, real, TensorProto.INT32]
    inputs = [value("boxes", real, ["batch", "n", 5]), value("scores", real, ["batch", "n", CLASSES])]
    asked = {**attributes(max_output_boxes=MOST, plugin_version="1"), **changed}
    node = helper.make_node("EfficientNMSRotated_TRT", ["boxes", "scores"], list(NAMES), "nms", **asked)
    outputs = [value(*of) for of in zip(NAMES, types, shapes, strict=True)]
    graph = helper.make_graph([node], "nms", inputs, outputs)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.ModelProto.SerializeToString(made)


def parsed(logger, text: bytes):
    """A builder, the network, its parser, and whether that took the model."""
    import tensorrt as trt

    plugins.load_plugin()
    builder = trt.Builder(logger)
    explicit = Capabilities.current().has_explicit_batch_flag
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH) if explicit else 0)
    parser = trt.OnnxParser(network, logger)
    return builder, network, parser, parser.parse(text)


def built(logger, kind: type) -> bytes:
    """An engine for 1 to 4 images of 1 to 3000 boxes."""
    import tensorrt as trt

    builder, network, parser, done = parsed(logger, model(kind, {}))
    assert done, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    ability, config = Capabilities.current(), builder.create_builder_config()
    config.builder_optimization_level = 0
    if kind is np.float16 and ability.has_fp16_flag:
        config.set_flag(trt.BuilderFlag.FP16)
    if ability.has_cublas_tactic_sources:
        config.set_tactic_sources(0)
    profile = builder.create_optimization_profile()
    for name, width in (("boxes", 5), ("scores", CLASSES)):
        profile.set_shape(name, (1, 1, width), (2, 500, width), (4, 3000, width))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return bytes(plan)


def executed(context, boxes: np.ndarray, scores: np.ndarray) -> dict[str, np.ndarray]:
    import pycuda.driver as cuda

    outputs = filled(len(boxes), MOST, boxes.dtype, 77)
    memory, stream = {}, cuda.Stream()
    for name, array in {"boxes": boxes, "scores": scores, **outputs}.items():
        memory[name] = cuda.mem_alloc(array.nbytes)
        cuda.memcpy_htod(memory[name], array)
        if name not in outputs:
            context.set_input_shape(name, array.shape)
        context.set_tensor_address(name, int(memory[name]))
    assert context.execute_async_v3(stream.handle)
    stream.synchronize()
    for name, array in outputs.items():
        cuda.memcpy_dtoh(array, memory[name])
    return outputs


@pytest.fixture
def gpu(request):
    if reason := missing():
        (pytest.fail if request.config.option.strict_cases else pytest.skip)(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [np.float32, np.float16], ids=["fp32", "fp16"])
def test_an_engine_is_built_stored_read_and_run_at_many_shapes(gpu, kind):
    import tensorrt as trt

    from alignment.engine.build import cuda_context
    from alignment.engine.log import Log, listening

    log = Log()
    with cuda_context(), listening(log) as logger:
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(built(logger, kind))
        assert {name: trt.nptype(engine.get_tensor_dtype(name)) for name in NAMES} == {
            name: kind if name in NAMES[1:3] else np.int32 for name in NAMES
        }
        context = engine.create_execution_context()
        for batch, count in [(2, 500), (1, 1), (4, 3000), (3, 33), (1, 3000), (4, 1), (2, 500)]:
            boxes, scores = scene(batch + count, batch, count, CLASSES, kind, side=400)
            found = executed(context, boxes, scores)
            assert same(found, expected(attributes(max_output_boxes=MOST), boxes, scores)), (batch, count)
        del context, engine, runtime
    assert not log.errors()


@pytest.mark.gpu
def test_tensorrt_tells_why_a_node_is_refused(gpu):
    from alignment.engine.build import cuda_context
    from alignment.engine.log import Log, listening

    log = Log()
    with cuda_context(), listening(log) as logger:
        *_, done = parsed(logger, model(np.float32, {"iou_threshold": 1.5}))
    assert not done
    assert any("iou_threshold must be from 0 to 1" in line for line in log.errors())
