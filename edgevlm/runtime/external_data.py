"""Where an ONNX graph says that its weights lie, read without the ``onnx`` package and without reading weights.

Older runtimes open whatever file a graph names, wherever it lies; a bundle's graphs may name its own alone. (ONNX
Runtime 1.23 does, the newest for Python 3.10; 1.32 and OpenVINO 2026.4 refuse one outside of the graph's folder.)
What is walked is the protobuf message of onnx.proto: a field is a number, a wire type and a value; a message inside
another is a value with a length, which is skipped where it cannot hold a tensor.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from edgevlm.errors import BundleError

# The messages that tensors are found in, each with the numbers of those of its fields that are such messages.
# Source: onnx.proto of ONNX 1.23.
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},  # external_data
    "Entry": {1: "key", 2: "value"},
}  # fmt: skip

# Source: protobuf's own limit, which ONNX Runtime keeps.
_MAX_DEPTH = 100

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types; groups (3 and 4) ONNX never had


def external_locations(graph: Path) -> frozenset[str]:
    """The files that the tensors of an ONNX graph, of its subgraphs and of its functions are said to lie in.

    Raises: BundleError: the file is no ONNX graph.
    """
    try:
        with graph.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            is_xml = data[0] == ord("<")  # OpenVINO's own; in a protobuf it would end a group that never began
            return frozenset() if is_xml else frozenset(_locations(data))
    except (ValueError, OSError) as error:  # an empty file cannot be mapped
        raise BundleError(
            f"'{graph.name}' is no ONNX graph: {error}.", hint="Fetch the bundle again, or compile the model again."
        ) from error


def _locations(data: mmap.mmap) -> list[str]:
    found = []
    waiting = [("Model", 0, 0, len(data))]
    while waiting:
        message, depth, start, end = waiting.pop()
        if depth > _MAX_DEPTH:
            raise ValueError(f"its messages are more than {_MAX_DEPTH} deep")
        if message == "Node" and data.find(b"location", start, end) < 0:
            continue  # nearly every node: reading its fields one by one takes most of the time
        fields = _FIELDS[message]
        entry = {"key": b"", "value": b""}
        while start < end:
            tag, start = _varint(data, start, end)
            if tag >> 32:
                raise ValueError(f"a field at byte {start} has no number")
            kind = tag & 7
            if kind == _VARINT:
                _, start = _varint(data, start, end)
                continue
            size = {_FIXED64: 8, _FIXED32: 4}.get(kind, 0)
            if kind == _LENGTH:
                size, start = _varint(data, start, end)
            elif not size:
                raise ValueError(f"a field at byte {start} has the unknown kind {kind}")
            if size > end - start:
                raise ValueError(f"a field at byte {start} is longer than what it lies in")
            inner = fields.get(tag >> 3) if kind == _LENGTH else None
            if inner in entry:
                entry[inner] = data[start : start + size]  # of a field that stands there twice the last one holds
            elif inner is not None:
                waiting.append((inner, depth + 1, start, start + size))
            start += size
        if entry["key"] == b"location":
            found.append(entry["value"].decode("utf-8", "backslashreplace"))
    return found


def _varint(data: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte, low ones first, and where it ends."""
    if start < end and data[start] < 0x80:  # nearly all
        return data[start], start + 1
    value = 0
    for place in range(start, min(start + 10, end)):
        value |= (data[place] & 0x7F) << (7 * (place - start))
        if data[place] < 0x80:
            return value, place + 1
    raise ValueError(f"a number at byte {start} does not end")
