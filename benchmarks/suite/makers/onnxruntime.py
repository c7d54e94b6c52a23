"""ONNX Runtime's quantizer with its documented defaults, after ``quant_pre_process`` as its documentation advises.

Source: onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "Pre-processing".
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.suite.makers import calibration_rows
from benchmarks.suite.spec import Made, MakeRequest
from edgevlm.runtime.spec import Array


class Rows:
    """The ``CalibrationDataReader`` that ``quantize_static`` asks for."""

    def __init__(self, calibration: str) -> None:
        self._rows = calibration_rows(calibration)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._rows, None)


def static_int8(request: MakeRequest) -> Made:
    from onnxruntime.quantization import quantize_static

    prepared, file = _prepared(request)
    quantize_static(str(prepared), str(file), Rows(request.calibration))
    prepared.unlink()
    return Made(
        file=file.name, says={"quantized by": "quantize_static, defaults (QDQ, S8S8, MinMax), after quant_pre_process"}
    )


def dynamic_int8(request: MakeRequest) -> Made:
    from onnxruntime.quantization import quantize_dynamic

    prepared, file = _prepared(request)
    quantize_dynamic(str(prepared), str(file))
    prepared.unlink()
    return Made(file=file.name, says={"quantized by": "quantize_dynamic, defaults, after quant_pre_process"})


def _prepared(request: MakeRequest) -> tuple[Path, Path]:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = Path(request.out) / "prepared.onnx"
    quant_pre_process(request.source, str(prepared))
    return prepared, Path(request.out) / "model.onnx"
