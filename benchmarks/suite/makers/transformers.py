"""Transformers' own exporters with their quantizers: a checkpoint in, an ONNX or OpenVINO graph out.

Source: the docstrings of ``transformers.exporters`` (5.23).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.suite.makers import calibration_rows
from benchmarks.suite.spec import Made, MakeRequest


def onnx_float(request: MakeRequest) -> Made:
    """With the fusions for ONNX Runtime on a CPU, which the exporter offers for that."""
    from transformers.exporters import OnnxConfig

    return _onnx(request, OnnxConfig(ort_fusions="cpu"), "OnnxExporter, ort_fusions='cpu'")


def onnx_static(request: MakeRequest) -> Made:
    from transformers.exporters import OnnxConfig, OnnxRuntimeQuantizer

    quantizer = OnnxRuntimeQuantizer(calibration_dataset=_samples(request))
    return _onnx(request, OnnxConfig(quantizer=quantizer), "OnnxExporter, OnnxRuntimeQuantizer with its defaults")


def onnx_dynamic(request: MakeRequest) -> Made:
    from transformers.exporters import OnnxConfig, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig())
    return _onnx(
        request, OnnxConfig(quantizer=quantizer), "OnnxExporter, OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig())"
    )


def onnx_nncf(request: MakeRequest) -> Made:
    from transformers.exporters import NNCFOnnxQuantizer, OnnxConfig

    quantizer = NNCFOnnxQuantizer(calibration_dataset=_samples(request))
    return _onnx(request, OnnxConfig(quantizer=quantizer), "OnnxExporter, NNCFOnnxQuantizer with its defaults")


def openvino_nncf(request: MakeRequest) -> Made:
    from transformers.exporters import NNCFOpenVINOQuantizer, OpenVINOConfig, OpenVINOExporter

    model, inputs = _model(request)
    quantizer = NNCFOpenVINOQuantizer(calibration_dataset=_samples(request))
    exported = OpenVINOExporter().export(model, inputs, OpenVINOConfig(quantizer=quantizer))
    exported.save_pretrained(request.out)
    return _found(request, "*.xml", "OpenVINOExporter, NNCFOpenVINOQuantizer with its defaults")


def _onnx(request: MakeRequest, config: Any, how: str) -> Made:
    from transformers.exporters import OnnxExporter

    model, inputs = _model(request)
    OnnxExporter().export(model, inputs, config).save_pretrained(request.out)
    return _found(request, "*.onnx", how)


def _model(request: MakeRequest) -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = getattr(transformers, request.architecture).from_pretrained(request.source).eval().requires_grad_(False)
    first = next(calibration_rows(request.calibration))
    return model, {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in first.items()}


def _samples(request: MakeRequest) -> list[dict[str, Any]]:
    import torch

    return [
        {name: torch.from_numpy(value) for name, value in row.items()} for row in calibration_rows(request.calibration)
    ]


def _found(request: MakeRequest, pattern: str, how: str) -> Made:
    (file,) = Path(request.out).glob(pattern)
    return Made(file=file.name, says={"made by": how})
