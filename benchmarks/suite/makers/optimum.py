"""optimum-onnx: ``ORTQuantizer`` with ``AutoQuantizationConfig.avx512_vnni``.

Source: huggingface.co/docs/optimum-onnx, "Quantization": ``fit`` with minmax, then ``quantize``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.suite.makers import calibration_rows
from benchmarks.suite.spec import Made, MakeRequest


def static_int8(request: MakeRequest) -> Made:
    from optimum.onnxruntime import AutoQuantizationConfig
    from optimum.onnxruntime.configuration import CalibrationConfig, CalibrationMethod

    config = AutoQuantizationConfig.avx512_vnni(is_static=True)
    quantizer = _quantizer(request)
    rows = [{name: value[0] for name, value in row.items()} for row in calibration_rows(request.calibration)]
    calibration = CalibrationConfig(
        dataset_name="pictures",
        dataset_config_name="",
        dataset_split="calibrate",
        dataset_num_samples=len(rows),
        method=CalibrationMethod.MinMax,
    )
    ranges = quantizer.fit(
        dataset=rows,
        calibration_config=calibration,
        onnx_augmented_model_name=str(Path(request.out) / "augmented.onnx"),
        operators_to_quantize=config.operators_to_quantize,
    )
    (Path(request.out) / "augmented.onnx").unlink(missing_ok=True)
    return _quantized(request, quantizer, config, "avx512_vnni(is_static=True), MinMax", ranges=ranges)


def dynamic_int8(request: MakeRequest) -> Made:
    from optimum.onnxruntime import AutoQuantizationConfig

    config = AutoQuantizationConfig.avx512_vnni(is_static=False)
    return _quantized(request, _quantizer(request), config, "avx512_vnni(is_static=False)")


def _quantizer(request: MakeRequest) -> Any:
    from optimum.onnxruntime import ORTQuantizer

    source = Path(request.out) / "source" / "model.onnx"
    source.parent.mkdir()
    shutil.copyfile(request.source, source)
    return ORTQuantizer.from_pretrained(source.parent, file_name=source.name)


def _quantized(request: MakeRequest, quantizer: Any, config: Any, how: str, *, ranges: Any = None) -> Made:
    quantizer.quantize(quantization_config=config, save_dir=request.out, calibration_tensors_range=ranges)
    shutil.rmtree(Path(request.out) / "source")
    return Made(file="model_quantized.onnx", says={"quantized by": f"ORTQuantizer, AutoQuantizationConfig.{how}"})
