"""OpenVINO's conversion, and NNCF's post-training quantization with its defaults.

Source: docs.openvino.ai, "Basic Quantization Flow": ``nncf.quantize(model, dataset)``, and
``model_type=nncf.ModelType.TRANSFORMER`` for models with attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.suite.makers import calibration_rows
from benchmarks.suite.spec import Made, MakeRequest


def as_float(request: MakeRequest) -> Made:
    """Weights stay float32 on disk: ``save_model`` would otherwise round them to 16 bits."""
    import openvino

    model = openvino.convert_model(request.source)
    openvino.save_model(model, Path(request.out) / "model.xml", compress_to_fp16=False)
    return Made(file="model.xml", says={"made by": "convert_model"})


def nncf_int8(request: MakeRequest) -> Made:
    import nncf
    import openvino

    model = openvino.convert_model(request.source)
    rows = list(calibration_rows(request.calibration))
    options: dict[str, Any] = {"model_type": nncf.ModelType.TRANSFORMER} if request.is_transformer else {}
    quantized = nncf.quantize(model, nncf.Dataset(rows), **options)
    openvino.save_model(quantized, Path(request.out) / "model.xml", compress_to_fp16=False)
    how = ", model_type=TRANSFORMER" if request.is_transformer else ""
    return Made(file="model.xml", says={"quantized by": f"nncf.quantize, defaults{how}"})


def nncf_int8_onnx(request: MakeRequest) -> Made:
    """NNCF on the ONNX graph, for those who run it with ONNX Runtime."""
    import nncf
    import onnx

    model = onnx.load(request.source)
    rows = list(calibration_rows(request.calibration))
    options: dict[str, Any] = {"model_type": nncf.ModelType.TRANSFORMER} if request.is_transformer else {}
    quantized = nncf.quantize(model, nncf.Dataset(rows), **options)
    onnx.save(quantized, Path(request.out) / "model.onnx")
    how = ", model_type=TRANSFORMER" if request.is_transformer else ""
    return Made(file="model.onnx", says={"quantized by": f"nncf.quantize on ONNX, defaults{how}"})
