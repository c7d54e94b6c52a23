"""What a graph says of where its weights lie, against what ``onnx`` wrote, and against files that it never wrote."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgevlm.errors import BundleError
from edgevlm.runtime.external_data import external_locations
from tests.runtime import tiny

# A fresh file for each example, in one folder: that is what the fixture is for.
on_files = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

LOCATIONS = st.text(st.characters(codec="utf-8"), max_size=12)
N_PLACES = 12


def tensor(location: str | None) -> TensorProto:
    """A constant that lies at ``location``, or in the graph."""
    made = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[3])
    if location is None:
        made.raw_data = b"location....."[:12]
        return made
    made.data_location = TensorProto.EXTERNAL
    for key, value in {"offset": "4096", "location": location, "length": "12"}.items():
        made.external_data.add(key=key, value=value)
    return made


def sparse(location: str | None) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=tensor(location), indices=tensor(None), dims=[9])


def graph_with(found: list[str | None]) -> onnx.ModelProto:
    """A graph with a tensor at every place where a tensor can stand."""
    inner = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "inner", [], [], [tensor(found[0])])
    branch = helper.make_graph([helper.make_node("If", ["c"], ["y"], then_branch=inner)], "outer", [], [])
    branch.sparse_initializer.append(sparse(found[1]))
    nodes = [
        helper.make_node("Constant", [], ["a"], value=tensor(found[2])),
        helper.make_node("If", ["c"], ["b"], then_branch=branch, else_branch=inner),
        helper.make_node("Odd", [], ["d"], domain="ours", many=[tensor(found[3]), tensor(found[4])], name="location"),
        helper.make_node("Odd", [], ["e"], domain="ours", thin=sparse(found[5]), thins=[sparse(found[6])]),
        helper.make_node(
            "Odd", [], ["f"], domain="ours", graphs=[helper.make_graph([], "g", [], [], [tensor(found[7])])]
        ),
    ]
    graph = helper.make_graph(nodes, "graph", [], [], [tensor(found[8]), tensor(None)], doc_string="location")
    function = helper.make_function(
        "ours", "Odd", [], ["y"], [helper.make_node("Constant", [], ["y"], value=tensor(found[9]))],
        [helper.make_opsetid("", 17)], attribute_protos=[helper.make_attribute("of_function", tensor(found[10]))],
    )  # fmt: skip
    model = helper.make_model(graph, functions=[function])
    model.metadata_props.add(key="location", value="elsewhere")
    model.training_info.add().algorithm.initializer.append(tensor(found[11]))
    return model


@on_files
@given(found=st.lists(st.none() | LOCATIONS, min_size=N_PLACES, max_size=N_PLACES))
@example(found=[f"{i}.data" for i in range(N_PLACES)])
@example(found=[None] * N_PLACES)
@example(found=["../" * 9 + "etc/passwd"] * N_PLACES)
def test_every_place_of_a_tensor_is_found_and_nothing_else(tmp_path: Path, found: list[str | None]):
    file = tmp_path / "graph.onnx"
    file.write_bytes(graph_with(found).SerializeToString())
    assert external_locations(file) == {each for each in found if each is not None}


def test_onnx_s_own_files_are_read(tmp_path: Path):
    model = onnx.load_from_string(tiny.image_graph())
    assert tiny.open_graph(tiny.image_graph(), tmp_path).inputs
    assert external_locations(tmp_path / "graph.onnx") == frozenset()
    onnx.save(model, tmp_path / "out.onnx", save_as_external_data=True, location="out.data", size_threshold=0)
    assert external_locations(tmp_path / "out.onnx") == {"out.data"}


def test_weights_in_the_graph_are_not_read(tmp_path: Path):
    """A graph of 3 GB, most of it a hole in the file, takes no memory."""
    size = 3 << 30
    before = graph_with(["a.data"] * N_PLACES).SerializeToString()
    raw = varint(9 << 3 | 2) + varint(size)
    initializer = varint(5 << 3 | 2) + varint(len(raw) + size)
    head = before + varint(7 << 3 | 2) + varint(len(initializer) + len(raw) + size) + initializer + raw
    file = tmp_path / "graph.onnx"
    with file.open("wb") as opened:
        opened.write(head)
        opened.truncate(len(head) + size)
    tracemalloc.start()
    try:
        assert external_locations(file) == {"a.data"}
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


LYING = varint(7 << 3 | 2) + varint(5) + varint(5 << 3 | 2) + varint(200) + bytes(2)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"\x3a", "does not end"),  # a graph without a length
        (b"\x3a\xff", "does not end"),
        (b"\x3a" + b"\xff" * 11, "does not end"),
        (b"\x3a\x05\x0a", "longer than"),
        (LYING, "longer than"),
        (b"\x3a" + varint(1 << 62), "longer than"),
        (b"\x39" + bytes(7), "longer than"),
        (b"\x3b\x3c", "unknown kind 3"),  # a group
        (b"\x0e", "unknown kind 6"),
        (varint((1 << 32) | 7 << 3 | 2) + b"\x00", "no number"),  # a parser that keeps 32 bits would see a graph
        (b"\x08\x80", "does not end"),
    ],
)  # fmt: skip
def test_what_is_no_graph_is_refused(tmp_path: Path, data: bytes, words: str):
    file = tmp_path / "graph.onnx"
    file.write_bytes(data)
    with pytest.raises(BundleError, match=rf"^'graph\.onnx' is no ONNX graph: .*{words}") as raised:
        external_locations(file)
    assert raised.value.hint and "\n" not in raised.value.message


@on_files
@given(data=st.data())
def test_a_spoilt_graph_is_refused_or_names_all_that_onnx_sees(tmp_path: Path, data: st.DataObject):
    """Whatever a file holds that a protobuf parser takes, no tensor of it is missed."""
    whole = graph_with([f"{i}.data" for i in range(N_PLACES)]).SerializeToString()
    place = data.draw(st.integers(0, len(whole) - 1))
    spoilt = whole[:place] + data.draw(st.binary(max_size=3)) + whole[place + data.draw(st.integers(0, 2)) :]
    file = tmp_path / "graph.onnx"
    file.write_bytes(spoilt)
    try:
        seen = {entry.value for each in tensors(onnx.load_from_string(spoilt)) for entry in each.external_data
                if entry.key == "location"}  # fmt: skip
    except Exception:  # the parser's own classes
        seen = set()
    try:
        assert external_locations(file) >= seen
    except BundleError as error:
        assert error.hint and "\n" not in error.message


@on_files
@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused_or_read(tmp_path: Path, data: bytes):
    file = tmp_path / "graph.onnx"
    file.write_bytes(data)
    try:
        external_locations(file)
    except BundleError as error:
        assert error.hint


@pytest.mark.parametrize("depth", [33, 34, 100_000])
def test_a_deep_graph_is_refused_as_onnx_refuses_it(tmp_path: Path, depth: int):
    graph = field(5, field(13, field(1, b"location") + field(2, b"a.data")))
    head = []  # of a graph in an attribute of a node of a graph, from the inside out
    n_bytes = len(graph)
    for _ in range(depth - 1):
        for number in (6, 5, 1):
            head.append(varint(number << 3 | 2) + varint(n_bytes))
            n_bytes += len(head[-1])
    data = varint(7 << 3 | 2) + varint(n_bytes) + b"".join(reversed(head)) + graph
    file = tmp_path / "graph.onnx"
    file.write_bytes(data)
    if depth == 33:  # the innermost entry is the 99th message in the model's
        assert external_locations(file) == {"a.data"}
        return
    with pytest.raises(BundleError, match="more than 100 deep"):
        external_locations(file)
    with pytest.raises(Exception, match="parsing"):
        onnx.load_from_string(data)


def field(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensors(message):
    """Every TensorProto in a message, found by what protobuf says of its fields."""
    if isinstance(message, TensorProto):
        yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in value if field.is_repeated else (value,):
                yield from tensors(each)
