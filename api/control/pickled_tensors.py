"""Named tensors out of a pickle that is not unpickled: nothing that it names is ever imported or called.

A pickle is a program for a small stack machine. The one here knows the few instructions that
``pickle.dumps([(name, tensor), …])`` consists of, and builds values of its own of them: the names in the
pickle stay names, and of calls it knows the five below. Everything else is refused as soon as it is met.

Read are tensors that are pickled with their numbers (by `pickle` itself, protocol 3 or newer), as pairs, as a
dict, or as SGLang's flattened bucket. What torch.multiprocessing makes of a tensor is a handle of memory of
the sender, which is refused with a line of its own.
"""

from __future__ import annotations

import io
import json
import math
import pickletools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from ...runtime.errors import PdserveError

_MAX_DIMENSIONS = 8
_MAX_EXPANSION = 2  # times the pickle is what it makes, at most: tied weights are a tensor of two names
# Of safetensors, by the names that torch has for a storage's class and for the type.
_TYPES = {
    "torch.FloatStorage": "F32",
    "torch.DoubleStorage": "F64",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.ByteStorage": "U8",
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.uint8": "U8",
}
_ITEM_BYTES = {"F32": 4, "F64": 8, "F16": 2, "BF16": 2, "U8": 1}
_HANDLES = ("rebuild_cuda_tensor", "_rebuild_cuda_tensor_modified", "LocalSerializedTensor")
_SHARED_MODULE = "torch.multiprocessing.reductions."
_BUCKET_ENTRY = "FlattenedTensorMetadata"
_STORAGE_MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save as it was before zip files, which a pickle holds
_STORAGE_VERSION = 1001


class UnreadablePickleError(PdserveError):
    """It is no pickle of named tensors. The message says what was met."""


@dataclass(frozen=True, slots=True)
class _Name:
    """``module.name`` of something that the pickle refers to, and that is not looked at here."""

    of: str


@dataclass(frozen=True, slots=True)
class _Storage:
    type: str  # of safetensors
    data: bytes

    @property
    def num_items(self) -> int:
        return len(self.data) // _ITEM_BYTES[self.type]


@dataclass(frozen=True, slots=True)
class _Tensor:
    """``size`` items of `storage` from `offset` on, `stride` apart in each dimension; all are within it."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def as_bytes(self) -> bytes:
        """In rows, without gaps."""
        item_bytes = _ITEM_BYTES[self.storage.type]
        items = np.frombuffer(self.storage.data, dtype=f"u{item_bytes}")[self.offset :]
        strides = [stride * item_bytes for stride in self.stride]
        return np.lib.stride_tricks.as_strided(items, self.size, strides, writeable=False).tobytes()


@dataclass(frozen=True, slots=True)
class _BucketEntry:
    """Which bytes of a bucket are which tensor."""

    fields: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _NamedBytes:
    name: str
    type: str
    shape: tuple[int, ...]
    data: bytes


def read_pickled_tensors(payload: bytes) -> bytes:
    """The pickle's tensors as a safetensors file. Raises UnreadablePickleError, whatever the bytes are."""
    machine = _Machine(_TENSOR_CALLS, _TYPES)
    tensors: dict[str, _NamedBytes] = {}
    num_bytes = 0
    for tensor in _named(machine.run(io.BytesIO(payload))):
        if tensor.name in tensors:
            raise UnreadablePickleError("a name is given twice")
        if (num_bytes := num_bytes + len(tensor.data)) > _MAX_EXPANSION * len(payload):
            raise UnreadablePickleError("its tensors are larger than it is")
        tensors[tensor.name] = tensor
    return _safetensors(tensors.values())


def _safetensors(tensors: Collection[_NamedBytes]) -> bytes:
    header: dict[str, object] = {}
    end = 0
    for tensor in tensors:
        offsets = [end, end := end + len(tensor.data)]
        header[tensor.name] = {"dtype": tensor.type, "shape": tensor.shape, "data_offsets": offsets}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return b"".join([len(encoded).to_bytes(8, "little"), encoded, *(tensor.data for tensor in tensors)])


# ---- what is made of what was read ------------------------------------------------------------------


def _named(value: object) -> Iterator[_NamedBytes]:
    if isinstance(value, dict) and value.keys() == {"flattened_tensor", "metadata"}:
        yield from _of_bucket(value["flattened_tensor"], value["metadata"])
        return
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, list | tuple):
        raise UnreadablePickleError("it holds neither (name, tensor) pairs nor a bucket of them")
    for pair in pairs:
        match pair:
            case (str(name), _Tensor() as tensor):
                yield _NamedBytes(name, tensor.storage.type, tensor.size, tensor.as_bytes())
            case _:
                raise UnreadablePickleError("it holds something else than (name, tensor) pairs")


def _of_bucket(bucket: object, entries: object) -> Iterator[_NamedBytes]:
    if not isinstance(bucket, _Tensor) or len(bucket.size) != 1 or not isinstance(entries, list | tuple):
        raise UnreadablePickleError("its bucket is not a flat tensor with a list of what lies in it")
    data, item_bytes = bucket.as_bytes(), _ITEM_BYTES[bucket.storage.type]
    for entry in entries:
        match entry:
            case _BucketEntry({"name": str(name), "dtype": _Name(of), **fields}) if of in _TYPES:
                sizes = _sizes(fields.get("shape"))
                begin, end = _count(fields.get("start_idx")), _count(fields.get("end_idx"))
                part = data[begin * item_bytes : end * item_bytes]
                if len(part) != math.prod(sizes) * _ITEM_BYTES[_TYPES[of]]:
                    raise UnreadablePickleError("a part of the bucket is not of its tensor's size")
                yield _NamedBytes(name, _TYPES[of], sizes, part)
            case _:
                raise UnreadablePickleError("its bucket has an entry that says not what it is")


def _rebuild_tensor(
    storage: object, offset: object, size: object, stride: object, *of_training: object
) -> _Tensor:
    """`of_training`: whether it wants a gradient, hooks and such, which do not count here."""
    del of_training
    if not isinstance(storage, _Storage):
        raise UnreadablePickleError("a tensor has no storage")
    first, sizes, strides = _count(offset), _sizes(size), _sizes(stride)
    if len(sizes) != len(strides):
        raise UnreadablePickleError("a tensor has more dimensions than strides, or fewer")
    # Before anything is computed with them: no tensor has more items than its storage.
    num_items = math.prod(sizes)
    last = first + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    is_within = last < storage.num_items and num_items <= storage.num_items
    if first > storage.num_items or (num_items and not is_within):
        raise UnreadablePickleError("a tensor reaches beyond its storage")
    return _Tensor(storage, first, sizes, strides)


def _rebuild_parameter(tensor: object, *of_training: object) -> _Tensor:
    del of_training
    if not isinstance(tensor, _Tensor):
        raise UnreadablePickleError("a parameter is no tensor")
    return tensor


def _storage(raw: object, *others: object) -> _Storage:
    """Of what torch's `torch.save` of a storage writes: five small pickles, then its items."""
    if not isinstance(raw, bytes) or others:
        raise UnreadablePickleError("a storage is no bytes")
    file = io.BytesIO(raw)
    magic, version, _, storage, keys = (_Machine({}, _TYPES, _described).run(file) for _ in range(5))
    if magic != _STORAGE_MAGIC or version != _STORAGE_VERSION or not isinstance(storage, _Described):
        raise UnreadablePickleError("a storage is not as torch writes it")
    num_items = int.from_bytes(file.read(8), "little")
    if keys != [storage.key] or num_items != storage.num_items:
        raise UnreadablePickleError("a storage is not the one that it says it is")
    data = file.read()
    if len(data) != num_items * _ITEM_BYTES[storage.type]:
        raise UnreadablePickleError("a storage has fewer items than it says, or more")
    return _Storage(storage.type, data)


@dataclass(frozen=True, slots=True)
class _Described:
    """A storage whose items come later in the file."""

    type: str
    key: str
    num_items: int


def _described(persistent_id: object) -> _Described:
    match persistent_id:
        case ("storage", _Name(of), str(key), str(), num_items, None) if of.endswith("Storage"):
            return _Described(_TYPES[of], key, _count(num_items))
        case _:
            raise UnreadablePickleError("a storage is not described as torch does it")


def _empty_dict(*items: object) -> dict[str, object]:
    if items:
        raise UnreadablePickleError("an OrderedDict is not empty at first")
    return {}


def _size(*sizes: object) -> tuple[int, ...]:
    return _sizes(sizes[0] if len(sizes) == 1 else sizes)


def _sizes(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > _MAX_DIMENSIONS:
        raise UnreadablePickleError("a shape is no tuple of a few sizes")
    return tuple(_count(size) for size in value)


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**48:
        raise UnreadablePickleError("a size is no number of items")
    return value


_TENSOR_CALLS: Mapping[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.storage._load_from_bytes": _storage,
    "torch.Size": _size,
    "collections.OrderedDict": _empty_dict,
}


# ---- the stack machine ------------------------------------------------------------------------------

_CONSTANTS: Mapping[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: Mapping[str, Callable[[], object]] = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict}
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1"}
_TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_LITERALS = frozenset(_NUMBERS | _TEXTS | _BYTES)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """Runs one pickle. `calls`: what REDUCE may do, by name. `names`: those that may stand for themselves.
    `persistent`: what a persistent id means."""

    def __init__(
        self,
        calls: Mapping[str, Callable[..., object]],
        names: Collection[str],
        persistent: Callable[[object], object] | None = None,
    ) -> None:
        self._calls = calls
        self._names = names
        self._persistent = persistent
        self._stack: list[object] = []
        self._below: list[list[object]] = []  # the stacks under each mark
        self._memo: dict[int, object] = {}

    def run(self, file: BinaryIO) -> object:
        """What the next pickle of the file makes; the file stands behind it then. Raises
        UnreadablePickleError."""
        self._stack, self._below, self._memo = [], [], {}
        try:
            for opcode, argument, _ in pickletools.genops(file):
                self._step(opcode.name, argument)
        except ValueError as error:  # of genops: cut off, or no pickle
            raise UnreadablePickleError(f"it is no pickle: {' '.join(str(error).split())}") from None
        value = self._pop()
        if self._stack or self._below:
            raise UnreadablePickleError("it is no whole pickle")
        return value

    def _step(self, opcode: str, argument: object) -> None:
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _ if opcode in _LITERALS:
                self._push(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self._push(_CONSTANTS[opcode])
            case "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_DICT":
                self._push(_EMPTY[opcode]())
            case "MARK":
                self._below.append(self._stack)
                self._stack = []
            case "TUPLE":
                self._push(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._push(tuple(reversed([self._pop() for _ in range(_TUPLES[opcode])])))
            case "APPEND":
                self._extend([self._pop()])
            case "APPENDS":
                self._extend(self._pop_to_mark())
            case "SETITEM":
                value, key = self._pop(), self._pop()
                self._update([key, value])
            case "SETITEMS":
                self._update(self._pop_to_mark())
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._top()
            case "BINPUT" | "LONG_BINPUT":
                self._memo[_count(argument)] = self._top()
            case "BINGET" | "LONG_BINGET":
                if argument not in self._memo:
                    raise UnreadablePickleError("it refers to what it never had")
                self._push(self._memo[_count(argument)])
            case "GLOBAL":
                self._push(self._name(*str(argument).rsplit(" ", 1)))
            case "STACK_GLOBAL":
                name, module = self._pop(), self._pop()
                self._push(self._name(module, name))
            case "REDUCE":
                arguments, call = self._pop(), self._pop()
                self._push(self._called(call, arguments))
            case "NEWOBJ":
                arguments, kind = self._pop(), self._pop()
                if kind != _Name(_BUCKET_ENTRY) or arguments != ():
                    raise UnreadablePickleError("it makes an object that is no entry of a bucket")
                self._push(_BucketEntry())
            case "BUILD":
                self._fill(self._pop(), self._top())
            case "BINPERSID" if self._persistent is not None:
                self._push(self._persistent(self._pop()))
            case _:
                raise UnreadablePickleError(f"it has the instruction {opcode}, which tensors do not need")

    def _name(self, module: object = None, name: object = None) -> _Name:
        of = f"{module}.{name}"
        if name in _HANDLES:
            raise UnreadablePickleError(
                f"it holds CUDA IPC handles ({name}), memory that lives in the trainer: hand `gpu` to "
                "/update_weights_from_ipc instead"
            )
        if of.startswith(_SHARED_MODULE):
            raise UnreadablePickleError(
                f"it holds handles of shared memory ({name}) in place of numbers, as torch.multiprocessing "
                "makes them, SGLang's MultiprocessingSerializer too: leave a safetensors file in /dev/shm "
                "and name it to /update_weights_from_ipc instead"
            )
        if name == _BUCKET_ENTRY:  # of SGLang, or of a trainer's copy of it
            return _Name(_BUCKET_ENTRY)
        if of not in self._calls and of not in self._names:
            raise UnreadablePickleError(f"it names {of[:100]!r}, which is not read")
        return _Name(of)

    def _called(self, call: object, arguments: object) -> object:
        if not isinstance(call, _Name) or call.of not in self._calls or not isinstance(arguments, tuple):
            raise UnreadablePickleError("it calls something that makes no tensor")
        try:
            return self._calls[call.of](*arguments)
        except TypeError:  # too few arguments
            raise UnreadablePickleError(f"it calls {call.of} with other arguments than torch") from None

    def _fill(self, state: object, entry: object) -> None:
        if not isinstance(entry, _BucketEntry) or not isinstance(state, dict):
            raise UnreadablePickleError("it sets the state of what is no entry of a bucket")
        entry.fields.update(state)

    def _extend(self, items: list[object]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise UnreadablePickleError("it appends to what is no list")
        target += items

    def _update(self, items: list[object]) -> None:
        target = self._top()
        keys = items[::2]
        if not isinstance(target, dict) or len(items) % 2 or not all(isinstance(key, str) for key in keys):
            raise UnreadablePickleError("it fills what is no dict of names")
        target.update(zip(keys, items[1::2], strict=True))

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> object:
        value = self._top()
        del self._stack[-1]
        return value

    def _top(self) -> object:
        if not self._stack:
            raise UnreadablePickleError("it takes more than it has")
        return self._stack[-1]

    def _pop_to_mark(self) -> list[object]:
        if not self._below:
            raise UnreadablePickleError("it takes more than it has")
        items, self._stack = self._stack, self._below.pop()
        return items
