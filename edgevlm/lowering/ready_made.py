"""Graphs that somebody quantized already: candidates like any other, once they fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgevlm.errors import ModelError, UsageError, did_you_mean
from edgevlm.model import Model

READY_MADE = "ready-made"


def find_ready_made(folder: Path, model: Model) -> dict[str, Path]:
    """The graphs in a folder, ``<graph>.onnx`` each, by the graph of the model that they stand for.

    Raises: UsageError: there is no such folder, or a graph in it is none of the model's.
    """
    names = [graph.name for graph in model.graphs]
    files = {file.stem: file.resolve() for file in sorted(folder.glob("*.onnx"))} if folder.is_dir() else {}
    if not files:
        wanted = " or ".join(f"{name}.onnx" for name in names)
        raise UsageError(f"'{folder}' holds no quantized graph.", hint=f"Pass a folder with {wanted}.")
    for name, file in files.items():
        if name not in names:
            raise UsageError(
                f"'{file.name}' in '{folder}' is called after no graph of '{model.source.asked}'.",
                hint=did_you_mean(name, names),
            )
    return files


def check_fits(file: Path, exported: Path) -> None:
    """Whether ``file`` takes and gives what the exported float graph does.

    Raises: ModelError: it does not, or is no ONNX graph.
    """
    import onnx

    try:
        got = onnx.load(file, load_external_data=False).graph
    except Exception as error:  # protobuf and onnx share no base but Exception
        raise ModelError(f"'{file}' is not an ONNX graph.", hint="Write it anew with `edgevlm quantize`.") from error
    expected = onnx.load(exported, load_external_data=False).graph
    constants = {tensor.name for tensor in got.initializer}
    for what, ours, theirs in (
        ("takes", [value for value in got.input if value.name not in constants], expected.input),
        ("gives", got.output, expected.output),
    ):
        mine, wanted = [_described(value) for value in ours], [_described(value) for value in theirs]
        if mine != wanted:
            raise ModelError(
                f"'{file.name}' {what} {', '.join(mine) or 'nothing'}, where the float graph {what} "
                f"{', '.join(wanted)}.",
                hint="Quantize the graph of the same model at the same --batch and --image-size.",
            )


def _described(value: Any) -> str:
    import onnx

    kind = value.type.tensor_type
    sizes = " × ".join(str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim)
    return f"'{value.name}' ({onnx.TensorProto.DataType.Name(kind.elem_type).lower()} {sizes})"
