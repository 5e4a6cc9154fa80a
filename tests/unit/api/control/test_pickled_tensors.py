"""A pickle of tensors, read without being unpickled."""

from __future__ import annotations

import io
import math
import pickle
import random
import sys
import types
from collections import OrderedDict
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from pdserve.api.control.pickled_tensors import UnreadablePickleError, read_pickled_tensors

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PROTOCOLS = (3, 4, 5)  # an older one spells bytes as a call
WEIGHT = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)


def same(payload: bytes, expected: dict[str, Tensor]) -> None:
    read = load(read_pickled_tensors(payload))
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_named_tensors_are_read(protocol: int, dtype: torch.dtype) -> None:
    tensors = {"a.weight": torch.randn(3, 5).to(dtype), "b": torch.zeros((), dtype=dtype)}
    for holder in (list(tensors.items()), tuple(tensors.items()), tensors, OrderedDict(tensors)):
        same(pickle.dumps(holder, protocol), tensors)


@pytest.mark.parametrize(
    "tensor",
    [
        WEIGHT.transpose(0, 2),
        WEIGHT[:, 1],
        WEIGHT[1:, :, ::2],
        WEIGHT[:0],
        torch.nn.Parameter(WEIGHT, requires_grad=False),
        torch.nn.Parameter(WEIGHT),
    ],
)
def test_views_and_parameters_are_read(tensor: Tensor) -> None:
    same(pickle.dumps([("t", tensor)]), {"t": tensor.detach().contiguous()})


def test_one_tensor_may_have_two_names() -> None:
    same(pickle.dumps([("a", WEIGHT), ("tied", WEIGHT)]), {"a": WEIGHT, "tied": WEIGHT})


# ---- a flattened bucket -------------------------------------------------------------------------------


@dataclass
class FlattenedTensorMetadata:
    """As SGLang's, where trainers have it."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


FlattenedTensorMetadata.__module__ = "sglang.srt.weight_sync.tensor_bucket"


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of that name, which pickling looks the class up in."""
    module = types.ModuleType(FlattenedTensorMetadata.__module__)
    vars(module)["FlattenedTensorMetadata"] = FlattenedTensorMetadata
    for parent in ("sglang", "sglang.srt", "sglang.srt.weight_sync"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def bucket(tensors: dict[str, Tensor], *, as_bytes: bool = True) -> dict[str, Any]:
    flat = [
        tensor.flatten().view(torch.uint8) if as_bytes else tensor.flatten() for tensor in tensors.values()
    ]
    metadata, end = [], 0
    for (name, tensor), part in zip(tensors.items(), flat, strict=True):
        start, end = end, end + part.numel()
        entry = FlattenedTensorMetadata(name, tensor.shape, tensor.dtype, start, end, part.numel())
        metadata.append(entry)
    return {"flattened_tensor": torch.cat(flat), "metadata": metadata}


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_flattened_bucket_is_read(protocol: int) -> None:
    tensors = {"a": WEIGHT, "b": WEIGHT[0].to(torch.bfloat16), "scalar": torch.tensor(1.5)}
    same(pickle.dumps(bucket(tensors), protocol), tensors)
    of_one_type = {"a": WEIGHT, "b": 2 * WEIGHT[1]}
    same(pickle.dumps(bucket(of_one_type, as_bytes=False), protocol), of_one_type)


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize(
    ("field", "value"),
    [("end_idx", 95), ("start_idx", -1), ("shape", [2, 3, 4]), ("dtype", None), ("name", 3)],
)
def test_a_bucket_that_does_not_fit_is_refused(field: str, value: object) -> None:
    wrong = bucket({"a": WEIGHT})
    setattr(wrong["metadata"][0], field, value)
    with pytest.raises(UnreadablePickleError):
        read_pickled_tensors(pickle.dumps(wrong))


# ---- what is refused ----------------------------------------------------------------------------------


class Runs:
    """Would call what it was given when it is unpickled."""

    def __init__(self, call: Any, *arguments: object) -> None:  # noqa: ANN401
        self._reduced = (call, arguments)

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self._reduced


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_would_run_code_is_refused_and_does_not_run(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for value in (
        Runs(exec, f"open({str(marker)!r}, 'w')"),
        Runs(Path.touch, marker),
        Runs(getattr, marker, "touch"),
        Runs(torch.load, str(marker)),
    ):
        for holder in (value, [("a", value)], [("a", WEIGHT), ("b", value)]):
            with pytest.raises(UnreadablePickleError):
                read_pickled_tensors(pickle.dumps(holder, protocol))
    assert not marker.exists()


def test_a_storage_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    """What a storage holds is a file of torch.save, which is a pickle again."""
    marker = tmp_path / "ran"
    inner = io.BytesIO()
    torch.save(Runs(Path.touch, marker), inner, _use_new_zipfile_serialization=False)
    crafted = Runs(torch.storage._load_from_bytes, inner.getvalue())
    with pytest.raises(UnreadablePickleError):
        read_pickled_tensors(pickle.dumps([("a", crafted)]))
    assert not marker.exists()


def test_handles_of_memory_are_refused_with_what_to_do() -> None:
    shared = io.BytesIO()
    ForkingPickler(shared).dump([("a", torch.zeros(3))])  # with torch's reductions, as SGLang's serializer
    with pytest.raises(UnreadablePickleError, match=r"shared memory .* /dev/shm"):
        read_pickled_tensors(shared.getvalue())
    for name in (b"torch.multiprocessing.reductions rebuild_cuda_tensor", b"sglang.srt.utils X"):
        module, attribute = name.replace(b" X", b" _rebuild_cuda_tensor_modified").split()
        with pytest.raises(UnreadablePickleError, match=r"CUDA IPC handles .* /update_weights_from_ipc"):
            read_pickled_tensors(b"\x80\x02c" + module + b"\n" + attribute + b"\n.")


def rebuilt(storage: torch.TypedStorage, *arguments: object) -> bytes:
    return pickle.dumps([("t", Runs(torch._utils._rebuild_tensor_v2, storage, *arguments))])


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (25,), (1,)),
        (1, (24,), (1,)),
        (25, (0,), (1,)),
        (-1, (1,), (1,)),
        (0, (2, 12), (13, 1)),
        (0, (2,), (-1,)),
        (0, (1 << 40,), (0,)),
        (0, (1 << 30, 1 << 30), (0, 0)),
        (0, (2**70,), (1,)),
        (0, (1,) * 9, (1,) * 9),
        (0, (2,), (1, 1)),
        (0, [24], (1,)),
        (0, (True,), (1,)),
        (0.0, (1,), (1,)),
        (0, (24.0,), (1,)),
    ],
)
def test_a_tensor_reaches_no_further_than_its_storage(offset: object, size: object, stride: object) -> None:
    storage = WEIGHT._typed_storage()  # type: ignore[no-untyped-call]
    same(rebuilt(storage, 0, (24,), (1,), False, OrderedDict()), {"t": WEIGHT.flatten()})
    with pytest.raises(UnreadablePickleError):
        read_pickled_tensors(rebuilt(storage, offset, size, stride, False, OrderedDict()))


@pytest.mark.parametrize(
    "value",
    [
        WEIGHT,
        "text",
        None,
        3,
        [WEIGHT],
        [("a", WEIGHT, 1)],
        [("a", 1.5)],
        [(1, WEIGHT)],
        {1: WEIGHT},
        [("a", WEIGHT), ("a", WEIGHT)],
        [(str(index), WEIGHT) for index in range(100)],
        [("a", torch.zeros(3, dtype=torch.complex64))],
        [("a", torch.zeros(2, 2).to_sparse())],
        {"flattened_tensor": WEIGHT, "metadata": []},
    ],
)
def test_what_holds_no_named_tensors_is_refused(value: object) -> None:
    with pytest.raises(UnreadablePickleError):
        read_pickled_tensors(pickle.dumps(value))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b".",
        b"N",
        b"\x80\x04.",
        b"\x80\x04(.",
        b"\x80\x02(K\x01s.",
        b"\x80\x02r\xff\xff\xff\xff.",  # a memo of 4 G entries, which CPython's own would allocate
        b"\x80\x02Nr\xff\xff\xff\xff.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # 8 EiB of bytes
        b"\x80\x04\x8b\xff\xff\xff\x7f1.",
        b"\x80\x04" + b"(" * 100_000 + b"t" * 100_000 + b".",
        b"\x80\x04]" + b"\x94h\x00a" * 1000 + b".",
        b"\xff" * 100,
        b"PK\x03\x04" + bytes(100),
    ],
)
def test_odd_bytes_are_refused(payload: bytes) -> None:
    with pytest.raises(UnreadablePickleError):
        read_pickled_tensors(payload)


OPCODES = bytes(range(256))


def mutated(payload: bytes, draw: random.Random) -> bytes:
    changed = bytearray(payload)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(changed))
        match draw.randrange(5):
            case 0:
                changed[at] = draw.choice(OPCODES)
            case 1:
                changed[at] ^= 1 << draw.randrange(8)
            case 2:
                del changed[at : at + draw.randrange(1, 9)]
            case 3:
                changed[at:at] = changed[
                    (begin := draw.randrange(len(changed))) : begin + draw.randrange(1, 40)
                ]
            case _:
                changed[at : at + 8] = draw.choice((b"\xff" * 8, bytes(8), (2**63 - 1).to_bytes(8, "little")))
        if not changed:
            return b""
    return bytes(changed)


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_changed_pickle_is_read_or_refused_and_nothing_else(protocol: int) -> None:
    """What is still read is a safetensors file, no larger than the bound."""
    draw = random.Random(protocol)
    tensors = {"a": WEIGHT[:1, :2], "b": WEIGHT[0, 0].to(torch.bfloat16)}
    seeds = [pickle.dumps(value, protocol) for value in (list(tensors.items()), tensors, bucket(tensors))]
    num_read = num_refused = 0
    lines: set[str] = set()  # beyond the first of a refusal
    for _ in range(3000):
        payload = mutated(draw.choice(seeds), draw)
        try:
            file = read_pickled_tensors(payload)
        except UnreadablePickleError as error:
            num_refused += 1
            lines.update(str(error).splitlines()[1:])
        else:
            num_read += 1
            read = load(file)
            assert sum(math.prod(t.shape) * t.element_size() for t in read.values()) <= 2 * len(payload)
    assert not lines
    assert num_read, "some changes are to the numbers alone"
    assert num_refused > num_read
