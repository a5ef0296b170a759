"""Checkpoints: the usual layouts are read, nothing in them is executed, and what is wrong with a file is said."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import operator
import os
import pickle
import re
import resource
import struct
import warnings
import zipfile

import numpy as np
import pytest

from alignment.errors import AlignError

torch = pytest.importorskip("torch")
checkpoint = pytest.importorskip("alignment.models.checkpoint")


class Head(torch.nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.reg_preds, self.cls_preds = torch.nn.Conv2d(width, 4, 1), torch.nn.Conv2d(width, classes, 1)


class Model(torch.nn.Module):
    def __init__(self, classes=3, width=8):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Conv2d(3, width, 3), torch.nn.BatchNorm2d(width))
        self.bbox_head = Head(classes, width)


def weights(seed=0, **options):
    torch.manual_seed(seed)
    return Model(**options).state_dict()


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert type(actual[key]) is torch.Tensor
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key


def save(path, content, legacy=False):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def refused(path):
    """The message of the one-line AlignError that names the file."""
    with pytest.raises(AlignError) as caught:
        checkpoint.load_state_dict(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert caught.value.mend
    return message


# ---- layouts ----


def ema(state):
    return {"steps": torch.tensor(7), **{f"module.{key}": value for key, value in state.items()}}


LAYOUTS = {
    "plain": lambda state, other: state,
    "plain-dict": lambda state, other: dict(state),
    "plain-beside-a-count": lambda state, other: {**state, "epoch": 3},
    "state-dict": lambda state, other: {"meta": {"epoch": 3}, "state_dict": state},
    "state-dict-holds-the-ema": lambda state, other: {"state_dict": state, "ema_state_dict": ema(other)},
    "ema-alone": lambda state, other: {"meta": {}, "ema_state_dict": ema(state)},
    "ddp": lambda state, other: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    "parameters": lambda state, other: {k: torch.nn.Parameter(v, v.is_floating_point()) for k, v in state.items()},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout, legacy):
    state, other = weights(0), weights(1)
    path = save(tmp_path / "model.pth", LAYOUTS[layout](state, other), legacy)
    assert_same(checkpoint.load_state_dict(path), state)


def test_a_module_named_module_is_no_prefix(tmp_path):
    state = {"module.weight": torch.ones(2), "bias": torch.zeros(2)}
    assert_same(checkpoint.load_state_dict(save(tmp_path / "model.pth", state)), state)


def runner_checkpoint(state):
    """What mmengine's CheckpointHook saves: log buffers, numpy scalars, optimizer and scheduler states."""
    logging = pytest.importorskip("mmengine.logging")
    hub = logging.MessageHub.get_instance("conformance-checkpoint")
    for step in range(3):
        hub.update_scalar("train/loss", np.float32(step / 3))
        hub.update_scalar("train/lr", np.float64(0.01))
    hub.update_info("iter", np.int64(3))
    buffer = logging.HistoryBuffer([1, 2, 3], [1, 1, 1])
    model = Model()
    model.load_state_dict(state)
    optimizer = torch.optim.AdamW(model.parameters())
    model.bbox_head.cls_preds.weight.sum().backward()
    optimizer.step()
    return {
        "meta": {"epoch": 3, "seed": np.int64(1), "dataset_meta": {"CLASSES": ("a", "b")}, "buffer": buffer},
        "state_dict": state,
        "message_hub": hub.state_dict(),
        "optimizer": optimizer.state_dict(),
        "param_schedulers": [{"last_step": np.float64(2), "method": buffer.mean, "groups": collections.Counter("ab")}],
        "ema_state_dict": ema(weights(1)),
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_checkpoint_of_mmengines_runner(tmp_path, legacy):
    state = weights()
    state["bbox_head.cls_preds.weight"] = state["bbox_head.cls_preds.weight"].half()
    path = save(tmp_path / "epoch_3.pth", runner_checkpoint(state), legacy)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(path, weights_only=True)
    assert_same(checkpoint.load_state_dict(path), state)


def test_odd_tensors_beside_what_only_the_inert_reader_takes(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    odd = {"view": base[1:, ::2], "transposed": base.T, "scalar": torch.tensor(3), "empty": torch.empty(0, 2)}
    odd |= {"bfloat16": base.bfloat16(), "bool": base > 3, "parameter": torch.nn.Parameter(base)}
    path = save(tmp_path / "model.pth", {"state_dict": odd, "log": np.float32(1), "ids": base.to(torch.uint16)})
    assert_same(checkpoint.load_state_dict(path), {key: value.detach() for key, value in odd.items()})


def test_a_tensor_that_is_negated_when_read_is_left_out_rather_than_wrong(tmp_path):
    negated = torch.tensor([1 + 2j]).conj().imag
    assert negated.is_neg()
    path = save(tmp_path / "model.pth", {"negated": negated, "weight": torch.ones(1), "log": np.float32(1)})
    assert list(checkpoint.load_state_dict(path)) == ["weight"]


# ---- nothing is executed ----


class Call:
    """Pickles as the call ``function(*arguments)``, both of which may be calls themselves."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __call__(self):
        """Pickle saves a function only when it is callable."""

    def __reduce__(self):
        return self.function, self.arguments


def attribute(module, name):
    return Call(getattr, Call(importlib.import_module, module), name)


def touch(marker):
    return f"open({str(marker)!r}, 'w').close()"


def hub_repository(marker):
    repository = marker.parent / "hub"
    repository.mkdir(exist_ok=True)
    (repository / "hubconf.py").write_text(f"{touch(marker)}\ndef model(): pass\n")
    return str(repository)


ATTACKS = {
    "os.system": lambda marker: Call(os.system, f"touch {marker}"),
    "eval": lambda marker: Call(eval, touch(marker)),
    "exec": lambda marker: Call(exec, touch(marker)),
    "getattr": lambda marker: Call(attribute("os", "system"), f"touch {marker}"),
    "getattr-of-builtins": lambda marker: Call(Call(getattr, Call(__import__, "builtins"), "eval"), touch(marker)),
    "partial": lambda marker: Call(functools.partial(os.system, f"touch {marker}")),
    "methodcaller": lambda marker: Call(
        operator.methodcaller("system", f"touch {marker}"), Call(importlib.import_module, "os")
    ),
    "torch.hub.load": lambda marker: Call(
        functools.partial(torch.hub.load, source="local"), hub_repository(marker), "model"
    ),
    "nested-in-ordered-dict": lambda marker: Call(
        collections.OrderedDict, [["a", Call(collections.OrderedDict, [["b", Call(eval, touch(marker))]])]]
    ),
    "as-tensor-arguments": lambda marker: Call(
        torch._utils._rebuild_tensor_v2,
        Call(eval, f"[{touch(marker)}, torch.FloatStorage(1)][1]"),
        0,
        (1,),
        (1,),
        0,
        {},
    ),
}
CONTAINERS = {
    "zip": save,
    "legacy": functools.partial(save, legacy=True),
    "pickle": lambda path, content: path.write_bytes(pickle.dumps(content)),
    "pickle-0": lambda path, content: path.write_bytes(pickle.dumps(content, protocol=0)),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_executed(tmp_path, attack, container):
    marker, path = tmp_path / "marker", tmp_path / "model.pth"
    state = weights()
    for content in (ATTACKS[attack](marker), {"state_dict": state, "meta": [ATTACKS[attack](marker)]}):
        CONTAINERS[container](path, content)
        assert not marker.exists(), "saving does not run it either"
        if container.startswith("pickle") or not isinstance(content, dict):
            refused(path)
        else:
            assert_same(checkpoint.load_state_dict(path), state)
        assert not marker.exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_attacks_are_live(tmp_path, attack):
    marker, path = tmp_path / "marker", tmp_path / "model.pth"
    save(path, [ATTACKS[attack](marker)])
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
        torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("key", ["state_dict", "ema_state_dict", "weight"])
def test_an_attack_in_place_of_weights(tmp_path, key):
    marker = tmp_path / "marker"
    path = save(tmp_path / "model.pth", {key: Call(eval, touch(marker))})
    assert "holds no tensors" in refused(path)
    assert not marker.exists()


GLOBALS = "torch._utils _rebuild_tensor_v2", "collections OrderedDict", "torch.nn.parameter Parameter", "torch Size"


@pytest.mark.parametrize("attribute", ["owned", "_function", "__setitem__", "__call__"])
@pytest.mark.parametrize("name", GLOBALS)
def test_no_attribute_of_anything_is_set(tmp_path, name, attribute):
    target = getattr(importlib.import_module(name.split()[0]), name.split()[1])
    before = getattr(target, attribute, None)
    path, good = tmp_path / "model.pth", save(tmp_path / "good.pth", {"state_dict": weights(), "lr": np.float64(1)})
    # A global, then BUILD with (state, slot state): pickle calls setattr(global, attribute, builtins.print).
    program = f"c{name}\nN}}V{attribute}\ncbuiltins\nprint\ns\x86b.".replace(" ", "\n").encode("latin-1")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02" + program)
        archive.writestr("model/version", "3\n")
    refused(path)
    assert getattr(target, attribute, None) == before
    assert_same(checkpoint.load_state_dict(good), weights())


def test_a_torchscript_archive_is_not_run(tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.ones(1)), path)
    assert "TorchScript" in refused(path)


# ---- files that are no checkpoints ----


def truncated(path):
    save(path, weights())
    path.write_bytes(path.read_bytes()[:-200])


def truncated_legacy(path):
    save(path, weights(), legacy=True)
    path.write_bytes(path.read_bytes()[:-200])


def other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        pytest.param(lambda path: None, "there is no such file", id="missing"),
        pytest.param(lambda path: path.mkdir(), "is a folder", id="folder"),
        pytest.param(lambda path: path.touch(), "is empty", id="empty"),
        pytest.param(truncated, "is cut off", id="truncated"),
        pytest.param(truncated_legacy, "is not a checkpoint that torch can read", id="truncated-legacy"),
        pytest.param(other_zip, "is not a checkpoint that torch can read", id="another-zip"),
        pytest.param(lambda path: path.write_text(LFS), "git-lfs pointer.*run git lfs pull", id="git-lfs"),
        pytest.param(lambda path: path.write_text("\n<!DOCTYPE html><html>404"), "is a web page", id="web-page"),
        pytest.param(lambda path: path.write_text("model = dict(type='YOLO')\n"), "is a text file", id="text"),
        pytest.param(lambda path: path.write_bytes(bytes(range(256))), "is not a checkpoint", id="bytes"),
        pytest.param(lambda path: path.write_bytes(pickle.dumps({"a": 1})), "is not a checkpoint", id="pickle"),
        pytest.param(lambda path: save(path, {"meta": {}}), "holds no tensors.*'meta'", id="no-tensors"),
        pytest.param(lambda path: save(path, torch.ones(3)), "holds no tensors", id="a-tensor"),
        pytest.param(lambda path: save(path, Model()), "holds no tensors", id="a-module"),
        pytest.param(lambda path: save(path, {"state_dict": {}}), "holds no tensors", id="empty-state-dict"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, write, message):
    path = tmp_path / "model.pth"
    write(path)
    assert re.search(message, refused(path))


def test_torch_told_to_read_tensors_only(tmp_path, monkeypatch):
    path = save(tmp_path / "model.pth", {"state_dict": weights(), "lr": np.float64(1)})
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    assert "unset TORCH_FORCE_WEIGHTS_ONLY_LOAD" in refused(path)


# ---- into a model ----


def does_not_fit(tmp_path, state, **options):
    model = Model(**options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / "model.pth"
    with pytest.raises(AlignError) as caught:
        checkpoint.load_into(model, state, path)
    assert_same(model.state_dict(), before)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_half_precision_weights_go_into_a_float32_model(tmp_path):
    state = {key: value.half() if value.is_floating_point() else value for key, value in weights().items()}
    model = Model()
    checkpoint.load_into(model, state, tmp_path)
    assert_same(model.state_dict(), {key: value.to(weights()[key].dtype) for key, value in state.items()})


ODD = {
    "sparse": torch.Tensor.to_sparse,
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    "meta": lambda tensor: tensor.to("meta"),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "nested": lambda tensor: torch.nested.nested_tensor(list(tensor)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_that_is_not_a_plain_one_is_named(tmp_path, kind):
    key = "backbone.0.weight"
    state = weights()
    path = save(tmp_path / "model.pth", state | {key: ODD[kind](state[key])})
    message = does_not_fit(tmp_path, checkpoint.load_state_dict(path))
    assert f": {key} is a {kind} tensor: save it as a dense one" in message


def test_batch_counters_may_be_missing_or_left_over(tmp_path):
    state = weights()
    counter = state.pop("backbone.1.num_batches_tracked")
    model = Model()
    checkpoint.load_into(model, state | {"neck.num_batches_tracked": counter}, tmp_path)
    assert torch.equal(model.backbone[0].weight, state["backbone.0.weight"])


def test_weights_of_another_model(tmp_path):
    state = {f"neck.{key}" if key.startswith("backbone.1") else key: value for key, value in weights(width=4).items()}
    assert re.search(
        r"4 missing \(first: backbone.1.weight\), 4 unexpected \(first: neck.backbone.1.weight\), "
        r"4 of another shape \(first: backbone.0.weight is \(4, 3, 3, 3\) in the file and \(8, 3, 3, 3\) in the model",
        does_not_fit(tmp_path, state),
    )


def test_weights_for_another_number_of_classes(tmp_path):
    message = does_not_fit(tmp_path, weights(classes=80))
    assert "number of classes does not fit: bbox_head.cls_preds.bias is (80,) in the file and (3,) in the m" in message


def test_one_weight_too_few(tmp_path):
    state = weights()
    del state["bbox_head.reg_preds.bias"]
    assert "1 missing (first: bbox_head.reg_preds.bias)" in does_not_fit(tmp_path, state)


def test_a_damaged_number_of_the_memo_takes_no_memory(tmp_path):
    """The largest that a pickle can give, in a checkpoint of the runner's, whose pickle is not of tensors alone."""
    path = tmp_path / "weights.pth"
    torch.save(runner_checkpoint(weights()), path)
    damaged = tmp_path / "damaged.pth"
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(damaged, "w") as copy:
        for entry in whole.infolist():
            content = whole.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert content.startswith(b"\x80\x02}q\x00")
                content = content.replace(b"}q\x00", b"}r" + struct.pack("<I", 2**27), 1)
            copy.writestr(entry, content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(AlignError):  # what else refers to that number finds nothing
        checkpoint.load_state_dict(damaged)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # kB
