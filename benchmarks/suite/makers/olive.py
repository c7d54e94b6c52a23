"""Olive: a workflow of one pass, ``OnnxStaticQuantization`` or ``OnnxDynamicQuantization``, with its defaults.

Source: microsoft.github.io/Olive, "Quantization" and "Data configs".
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from benchmarks.suite.makers import calibration_rows
from benchmarks.suite.spec import Made, MakeRequest


def static_int8(request: MakeRequest) -> Made:
    pictures = {
        "name": "pictures",
        "type": "DataContainer",
        "load_dataset_config": {"type": "calibration_rows", "params": {"file": request.calibration}},
        "pre_process_data_config": {"type": "skip_pre_process"},
        "post_process_data_config": {"type": "skip_post_process"},
        "dataloader_config": {"type": "default_dataloader", "params": {"batch_size": 1}},
    }
    _register_rows()
    return _run(request, {"type": "OnnxStaticQuantization", "data_config": "pictures"}, data_configs=[pictures])


def dynamic_int8(request: MakeRequest) -> Made:
    return _run(request, {"type": "OnnxDynamicQuantization"})


def _register_rows() -> None:
    from olive.data.component.dataset import BaseDataset
    from olive.data.registry import Registry

    @Registry.register_dataset("calibration_rows")  # type: ignore[untyped-decorator]
    def rows(file: str, **_: Any) -> Any:
        return BaseDataset([{name: value[0] for name, value in row.items()} for row in calibration_rows(file)])


def _run(request: MakeRequest, step: dict[str, Any], **more: Any) -> Made:
    # Olive reports its use, and looks for devices, unless it is told not to.
    os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
    import olive

    work = Path(request.out) / "work"
    config = {
        "input_model": {"type": "OnnxModel", "model_path": request.source},
        "passes": {"quantize": step},
        "output_dir": str(work / "out"),
        "cache_dir": str(work / "cache"),
        **more,
    }
    output = olive.run(config)
    best = output.get_best_candidate()
    if best is None:
        raise RuntimeError("Olive gave no model.")
    file = Path(request.out) / "model.onnx"
    shutil.copyfile(best.model_path, file)
    shutil.rmtree(work)
    return Made(file=file.name, says={"quantized by": f"olive.run, pass {step['type']} with its defaults"})
