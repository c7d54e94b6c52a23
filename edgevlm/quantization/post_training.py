"""Post-training int8: prepare a float graph, then write one Q/DQ graph per scheme. ONNX Runtime does the work."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from edgevlm.errors import ModelError
from edgevlm.quantization.embeddings import EMBEDDING_BLOCK_SIZE, embedding_names, quantize_embeddings
from edgevlm.quantization.graphs import has_external_data, operator_counts, selected_nodes
from edgevlm.quantization.schemes import Scheme
from edgevlm.runtime.spec import Spec

# A protobuf ends at 2 GB; the quantizer holds copies, so weights move out of the file well before.
_INLINE_LIMIT_BYTES = 1 << 30

# What ONNX Runtime calls its kernels after fusion.
_INT8_KERNELS = (
    "QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger",
)  # fmt: skip
_METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
# ONNX Runtime's words for a ``Scheme`` that ``is_symmetric``; biases would become 32-bit integers.
_SYMMETRIC = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
_FLOAT_KERNELS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


class Fusion(Spec, frozen=True, kw_only=True):
    """What ONNX Runtime really runs, by kernel, after its own fusions.

    Args:
        n_int8: convolutions and matrix products in int8.
        n_float: convolutions and matrix products left in float (products of two activations are meant to be).
        n_casts: quantize and dequantize nodes left between them.
    """

    n_int8: dict[str, int]
    n_float: dict[str, int]
    n_casts: int

    def describe(self) -> str:
        """In words, for a report."""
        n_int8, n_float = sum(self.n_int8.values()), sum(self.n_float.values())
        return f"{n_int8} convolutions and matrix products in int8, {n_float} in float, {self.n_casts} casts"


class Quantized(Spec, frozen=True, kw_only=True):
    """A quantized graph.

    Args:
        files: names in the folder of the graph: it first, then its external data.
    """

    files: tuple[str, ...]
    fusion: Fusion


def count_operators(graph: Path) -> dict[str, int]:
    """How many nodes of each operator type a graph has, by name."""
    import onnx

    return operator_counts(onnx.load(graph, load_external_data=False).graph)


def prepare(graph: Path, out: Path) -> Path:
    """Write ``graph`` with shapes inferred, batch norms folded and MatMul + Add made Gemm, ready for every scheme.

    Gemms must exist before Q/DQ are inserted: made later, by the session, they get a float bias and stay float.

    Raises: ModelError: ONNX Runtime cannot read the graph.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix=".edgevlm-", dir=out.parent) as folder, quiet():
        prepared = Path(folder) / out.name
        try:
            is_large = has_external_data(graph) or graph.stat().st_size > _INLINE_LIMIT_BYTES
            quant_pre_process(
                str(graph),
                str(prepared),
                # It refuses graphs such as ESPNetv2, takes longer than all the rest, and types no tensor more.
                skip_symbolic_shape=True,
                save_as_external_data=is_large,
                all_tensors_to_one_file=True,
                external_data_location=_data_name(out) if is_large else None,
            )
        except Exception as error:  # onnx, onnxruntime and the shape inference share no base but Exception
            raise ModelError(
                f"'{graph.name}' cannot be prepared for quantization: {first_line(error)}",
                hint="Check that ONNX Runtime opens the graph, or compile it as fp32.",
            ) from error
        model = onnx.load(prepared, load_external_data=False)
        _name_nodes(model.graph)
        onnx.save(model, prepared)
        if is_large:
            (Path(folder) / _data_name(out)).replace(out.parent / _data_name(out))
        prepared.replace(out)
    return out


def quantize(
    prepared: Path,
    scheme: Scheme,
    *,
    ranges: Path | None,
    out: Path,
    keep_float: tuple[str, ...] = (),
    overrides: Mapping[str, list[dict[str, Any]]] | None = None,
) -> Quantized:
    """Write ``prepared`` lowered by ``scheme``. The same graph, scheme and ranges give the same bytes.

    Args:
        keep_float: nodes, by name, that stay in float though the scheme would make them int8.
        ranges: what ``collect_ranges`` wrote for ``scheme.calibration``; null for a dynamic scheme.
        overrides: scales and zero points that were learned, by value: ONNX Runtime's ``TensorQuantOverrides``.
    Raises: ModelError: there is nothing to quantize, or ONNX Runtime refuses.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_dynamic, quantize_static

    graph = onnx.load(prepared, load_external_data=False).graph
    nodes = selected_nodes(graph, scheme, frozenset(keep_float))
    has_work = any(node.op_type in scheme.op_types for node in nodes)
    if not has_work and not (scheme.embedding_bits and set(embedding_names(graph)) - set(keep_float)):
        raise ModelError(
            f"'{prepared.name}' has nothing that {scheme.name} makes int8 ({', '.join(scheme.op_types)}).",
            hint="Leave that scheme out, or compile with --precision fp32.",
        )
    if (ranges is None) != (scheme.calibration is None):
        raise ValueError(f"{scheme.name} takes {'no' if ranges else 'its'} activation ranges")
    is_large = has_external_data(prepared)
    shared: dict[str, Any] = {
        "per_channel": scheme.per_channel,
        "reduce_range": scheme.reduce_range,
        "weight_type": QuantType.QInt8,
        "use_external_data_format": is_large,
    }
    with tempfile.TemporaryDirectory(prefix=".edgevlm-", dir=out.parent) as folder, quiet():
        # The same name as in the end: the graph names its external data by it.
        written = Path(folder) / out.name
        try:
            if not has_work:
                save_model(onnx.load(prepared), written, is_large=is_large)
            elif scheme.method == "dynamic":
                quantize_dynamic(
                    prepared,
                    written,
                    op_types_to_quantize=list(scheme.op_types),
                    nodes_to_exclude=list(keep_float),
                    **shared,
                )
            else:
                quantize_static(
                    prepared,
                    written,
                    op_types_to_quantize=sorted({node.op_type for node in nodes}),
                    nodes_to_quantize=[node.name for node in nodes],
                    activation_type=QuantType.QUInt8 if scheme.activation == "u8" else QuantType.QInt8,
                    calibrate_method=CalibrationMethod[_METHODS[str(scheme.calibration)]],
                    calibration_cache_path=ranges,
                    extra_options={
                        "OpTypesToExcludeOutputQuantization": list(scheme.float_output_op_types),
                        "TensorQuantOverrides": dict(overrides or {}),
                        **(_SYMMETRIC if scheme.is_symmetric else {}),
                    },
                    **shared,
                )
            if scheme.embedding_bits:
                _pack_embeddings(written, scheme.embedding_bits, keep_float, is_large=is_large)
        except Exception as error:  # the quantizer raises bare ValueError, RuntimeError, KeyError, ...
            raise ModelError(
                f"ONNX Runtime cannot quantize '{prepared.name}' by {scheme.name}: {first_line(error)}",
                hint="Leave that scheme out, or compile with --precision fp32.",
            ) from error
        fusion = fusion_of(written)
        files = [out.name]
        if is_large:
            (Path(folder) / _data_name(out)).replace(out.parent / _data_name(out))
            files.append(_data_name(out))
        written.replace(out)
    return Quantized(files=tuple(files), fusion=fusion)


def _pack_embeddings(file: Path, bits: Literal[4, 8], keep_float: tuple[str, ...], *, is_large: bool) -> None:
    """Make the embeddings of a graph small, where it lies."""
    import onnx

    model = onnx.load(file)
    if quantize_embeddings(model, bits=bits, block_size=EMBEDDING_BLOCK_SIZE, keep_float=keep_float):
        external_file(file).unlink(missing_ok=True)  # onnx would write behind what is there
        save_model(model, file, is_large=is_large)


def fusion_of(file: Path) -> Fusion:
    """Let ONNX Runtime optimise ``file`` and count what it will run.

    Raises: ModelError: it does not open the graph.
    """
    counts = kernel_counts(file)
    return Fusion(
        n_int8={op: n for op, n in counts.items() if op in _INT8_KERNELS},
        n_float={op: n for op, n in counts.items() if op in _FLOAT_KERNELS},
        n_casts=sum(counts.get(op, 0) for op in ("DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear")),
    )


def kernel_counts(file: Path) -> dict[str, int]:
    """How many nodes of each operator type ONNX Runtime runs, by name, after its own fusions.

    Raises: ModelError: it does not open the graph.
    """
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="edgevlm-fusion-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        try:
            ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no base but Exception
            raise ModelError(
                f"ONNX Runtime does not open what it quantized, '{file.name}': {first_line(error)}",
                hint="Leave that scheme out, or compile with --precision fp32.",
            ) from error
        return count_operators(optimized)


def external_file(graph: Path) -> Path:
    """Where a graph's external data lies, if it has any."""
    return graph.with_name(_data_name(graph))


def save_model(model: Any, file: Path, *, is_large: bool) -> None:
    """Write a ``ModelProto``; its weights go beside it where it ``is_large``."""
    import onnx

    onnx.save(
        model,
        file,
        save_as_external_data=is_large,
        all_tensors_to_one_file=True,
        location=_data_name(file) if is_large else None,
    )


def _data_name(graph: Path) -> str:
    """Where ONNX Runtime's quantizer puts a graph's external data."""
    return f"{graph.name}.data"


def _name_nodes(graph: Any) -> None:
    """Give every node a name of its own: schemes pick nodes by name."""
    taken: set[str] = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{index}"
        taken.add(node.name)


@contextmanager
def quiet() -> Iterator[None]:
    """The quantizer warns through the root logger about what is meant."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
