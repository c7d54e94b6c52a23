"""Weights and activations in 16-bit floats: half the bytes. On x86 ONNX Runtime still computes in 32 bits."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from edgevlm.errors import DataError, ModelError
from edgevlm.quantization.graphs import has_external_data
from edgevlm.quantization.post_training import external_file, first_line, kernel_counts, quiet, save_model
from edgevlm.runtime.spec import Array, Spec

# A float16 ends at 65504. Constants beyond half of that are masks that stand for infinity, and two may be added.
_MAX_CONSTANT = 32752.0
# Every tensor of the graph is kept for each; overflow comes from a layer's outlier channels, not from a rare input.
_MAX_CHECKED = 8


class Halved(Spec, frozen=True, kw_only=True):
    """A graph in float16; its inputs and outputs keep their types.

    Args:
        files: names in the folder of the graph: it first, then its external data.
        n_casts: nodes that turn 16 bits into 32 or back as the graph runs.
    """

    files: tuple[str, ...]
    n_casts: int

    def describe(self) -> str:
        """In words, for a report."""
        return f"16-bit weights, {self.n_casts} casts"


def fp16_graph(prepared: Path, feeds: Iterable[Mapping[str, Array]], *, out: Path) -> Halved:
    """Write ``prepared`` in float16, after looking for overflow at every tensor.

    Args:    feeds: real inputs by name; the first few are run.
    Raises:  ModelError: a tensor overflows, or ONNX Runtime refuses. DataError: there are no feeds.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    checked = list(itertools.islice(feeds, _MAX_CHECKED))
    if not checked:
        raise DataError(
            f"There is nothing to check '{prepared.name}' in fp16 with: 0 samples.",
            hint="Give at least one picture with --calibration-data.",
        )
    is_large = has_external_data(prepared)
    with tempfile.TemporaryDirectory(prefix=".edgevlm-", dir=out.parent) as folder, quiet():
        written = Path(folder) / out.name
        try:
            # Types are inferred without the weights: with them a model over 2 GB is more than protobuf carries.
            model = onnx.shape_inference.infer_shapes(onnx.load(prepared, load_external_data=False))
            onnx.load_external_data_for_model(model, str(prepared.parent))
            model = convert_float_to_float16(
                model, keep_io_types=True, disable_shape_infer=True, max_finite_val=_MAX_CONSTANT
            )
            save_model(model, written, is_large=is_large)
        except Exception as error:  # the converter raises whatever onnx does
            raise ModelError(
                f"'{prepared.name}' cannot be converted to fp16: {first_line(error)}",
                hint="Leave that precision out.",
            ) from error
        n_casts = kernel_counts(written).get("Cast", 0)
        _refuse_overflow(prepared, written, checked)
        files = [out.name]
        if is_large:
            external_file(written).replace(external_file(out))
            files.append(external_file(out).name)
        written.replace(out)
    return Halved(files=tuple(files), n_casts=n_casts)


def _refuse_overflow(prepared: Path, half: Path, feeds: Sequence[Mapping[str, Array]]) -> None:
    """Look at every tensor that has 16 bits: the kernels of this machine may keep 32 where another's do not."""
    import onnx

    known = {name for node in onnx.load(prepared, load_external_data=False).graph.node for name in node.output}
    names = [name for name in _half_tensors(half) if name in known]
    for feed in feeds:
        values = _run_for(half, names, feed)
        suspects = [name for name in names if not np.isfinite(values[name]).all()]
        floats = _run_for(prepared, suspects, feed) if suspects else {}
        for name in suspects:
            is_new = np.isfinite(floats[name]) & ~np.isfinite(values[name])
            if is_new.any():
                raise ModelError(
                    f"In fp16 '{prepared.name}' overflows: tensor '{name}' reaches "
                    f"{np.abs(floats[name][is_new]).max():.3g}, and 16 bits end at 65504.",
                    hint="Leave fp16 out: use --precision int8-weights, or bf16 with --backend openvino.",
                )


def _half_tensors(half: Path) -> list[str]:
    """Names of the float16 tensors that nodes write, in the graph's order."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(half, load_external_data=False)).graph
    halves = {v.name for v in graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    return [name for node in graph.node for name in node.output if name in halves]


def _run_for(file: Path, names: Sequence[str], feed: Mapping[str, Array]) -> dict[str, Array]:
    """What the tensors called ``names`` hold."""
    import onnx
    import onnxruntime as ort

    model = onnx.load(file, load_external_data=False)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Else it makes the biases of int8 layers 32-bit integers, and in float16 the division for that overflows.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values: list[Array] = session.run(list(names), dict(feed))
    return dict(zip(names, values, strict=True))
