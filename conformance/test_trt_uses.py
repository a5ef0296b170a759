"""The check of TensorRT's names reports what is planted, under whatever disguise, and nothing else."""

from __future__ import annotations

import pytest
from trt_faults import faults, unguarded


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("trt.DoesNotExist(1)", "DoesNotExist"),
        ("trt.BuilderFlag.NO_SUCH", "BuilderFlag.NO_SUCH"),
        ("x = trt.BuilderFlag.FP16", "BuilderFlag.FP16"),
        ("self._context.execute_async_v2(1)", "IExecutionContext.execute_async_v2"),
        ("config.max_workspace_size = 1", "IBuilderConfig.max_workspace_size"),
        # Under other names, in other places.
        ("trt.Builder(log).max_batch_size = 1", "Builder.max_batch_size"),
        ("trt.Builder(log).create_builder_config().max_workspace_size = 1", "unknown.max_workspace_size"),
        ("settings = config.clone(); settings.max_workspace_size = 1", "unknown.max_workspace_size"),
        ("flags = trt.BuilderFlag; x = flags.FP16", "unknown.FP16"),
        ("for part in [network.get_layer(0)]: part.precision", "unknown.precision"),
        ("parts = {}; parts[0] = network.get_layer(0); parts[0].precision", "unknown.precision"),
        ("parts = []; parts.append(layer); [part.precision for part in reversed(parts)]", "unknown.precision"),
        ("parts = {0: layer}; [part.precision for _, part in parts.items()]", "unknown.precision"),
        ("thing.precision", "unknown.precision"),
        ("self._thing = network.get_layer(0); self._thing.precision", "unknown.precision"),
        ("made(config).max_workspace_size", "unknown.max_workspace_size"),
        ("getattr(config, name)", "unknown.getattr"),
        ("with opened(engine) as e: e.num_bindings", "unknown.num_bindings"),
    ],
)
def test_planted_fault_is_reported(line: str, fault: str):
    source = (
        f"def made(x): ...\nclass A:\n    def f(self, config, thing, opened):\n        import tensorrt as trt; {line}\n"
    )
    if line.startswith(("for", "with")):
        source = source.replace("trt; ", "trt\n        ")
    assert [found for found in faults(source) if fault in found and "line " in found], faults(source)


HIDDEN = {
    "a parameter of a TensorRT type": "def f(cfg: 'trt.IBuilderConfig') -> None:\n    import tensorrt as trt\n",
    "a function that returns one": (
        "def made() -> trt.IBuilderConfig: ...\ndef f() -> None:\n    import tensorrt as trt\n    cfg = made()\n"
    ),
    "a parameter of any type": "def f(cfg: object) -> None:\n    import tensorrt as trt\n",
    "an element of a list": "def f(parts: list) -> None:\n    import tensorrt as trt\n    cfg = parts[0]\n",
    "a copy": "def f(config) -> None:\n    import copy, tensorrt as trt\n    cfg = copy.copy(config)\n",
    "a cast": "def f(config) -> None:\n    import tensorrt as trt\n    cfg = typing.cast('x', config)\n",
    "an attribute of another object": "def f(r: Run) -> None:\n    import tensorrt as trt\n    cfg = r.config\n",
    "a global": (
        "cfg = None\ndef g():\n    global cfg\n    import tensorrt as trt\n    cfg = trt.Builder(0)\ndef f() -> None:\n"
    ),
    "a property": (
        "class A:\n  @property\n  def _cfg(self) -> Any: ...\n  def f(self) -> None:\n    import tensorrt as trt\n"
        "    cfg = self._cfg\n"
    ),
    "a field": "class A:\n  cfg: Any\ndef f(a: A) -> None:\n    import tensorrt as trt\n    cfg = a.cfg\n",
    "the module by name": "def f() -> None:\n    rt = importlib.import_module('tensorrt')\n    cfg = rt.Builder(0)\n",
}


@pytest.mark.parametrize("source", HIDDEN.values(), ids=list(HIDDEN))
def test_a_hidden_object_is_reported_by_both_nets(source: str):
    source += "    cfg.max_workspace_size = 1\n"
    assert [fault for fault in faults(source) if "could be TensorRT's" in fault]
    assert unguarded(source) == [
        f"line {len(source.splitlines())}: cfg.max_workspace_size: a name that some versions lack"
    ]


@pytest.mark.parametrize(
    "line",
    [
        "operator.attrgetter('max_workspace_size')(cfg)",
        "operator.attrgetter('config.max_workspace_size')(cfg)",
        "setattr(cfg, 'max_workspace_size', 1)",
        "cfg.max_workspace_size",
        "cfg[0].thing().set_dynamic_range(0, 1)",
    ],
)
def test_a_name_that_comes_and_goes_is_reported_whatever_has_it(line: str):
    assert unguarded(f"def f(cfg: Thing) -> None:\n    {line}\n")


def test_what_is_not_tensorrts_is_left_alone():
    harmless = (
        "import numpy as np\nimport tensorrt as trt\n"
        "def f(path: Path, config) -> None:\n"
        "    names = [path.stem]\n    names.append(str(config.num_optimization_profiles).strip())\n"
        "    sizes = {name: np.zeros(3) for name in names}\n"
        "    return {n: a.precision for n, a in sizes.items()}, path.parent.dynamic_range, ' '.join(names).strip()\n"
    )
    assert faults(harmless) == []


def test_a_member_that_a_version_lacks_is_found_where_tensorrt_is_not_imported():
    assert faults("def f(thing):\n    return thing.set_dynamic_range(1)\n")
    assert faults("def f(thing):\n    return thing.copy()\n") == []


FP16 = "trt.BuilderFlag.FP16"


@pytest.mark.parametrize(
    "body",
    [
        f"if can.has_fp16_flag: x = {FP16}",
        f"if here and can.has_fp16_flag: x = {FP16}",
        f"if not can.has_fp16_flag: pass\n  else: x = {FP16}",
        f"if not (can.has_fp16_flag and here): raise No\n  x = {FP16}",
        f"if here or not can.has_fp16_flag: return\n  for y in z: x = {FP16}",
        f"x = {FP16} if can.has_fp16_flag else 0",
        f"x = can.has_fp16_flag and {FP16}",
        f"x = not can.has_fp16_flag or {FP16}",
        f"assert can.has_fp16_flag\n  x = {FP16}",
        f"x = [{FP16} for y in z if can.has_fp16_flag]",
    ],
)
def test_a_guard_is_accepted(body: str):
    source = f"def f(trt, can):\n  {body}\n"
    assert faults(source) == unguarded(source) == []


@pytest.mark.parametrize(
    "body",
    [
        f"x = {FP16}",
        f"can.has_fp16_flag\n  x = {FP16}",
        f"if can.has_int8_flag: x = {FP16}",
        f"if not can.has_fp16_flag: x = {FP16}",
        f"if can.has_fp16_flag: pass\n  else: x = {FP16}",
        f"if can.has_fp16_flag or here: x = {FP16}",
        f"if can.has_fp16_flag: pass\n  x = {FP16}",
        f"if not can.has_fp16_flag and here: raise No\n  x = {FP16}",
        f"if not can.has_fp16_flag: log()\n  x = {FP16}",
        f"x = 0 if can.has_fp16_flag else {FP16}",
        f"x = can.has_fp16_flag or {FP16}",
        f"x = {FP16}\n  assert can.has_fp16_flag",
        f"pass\ndef g(trt, can):\n  x = {FP16}\ndef h(can):\n  assert can.has_fp16_flag",
    ],
)
def test_what_does_not_guard_is_refused(body: str):
    source = f"def f(trt, can):\n  {body}\n"
    assert len(faults(source)) == len(unguarded(source)) == 1
