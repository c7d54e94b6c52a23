"""What else a user could run: a table of values, each tool with the defaults that its own documentation gives."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.suite.spec import Rival

ORT = "onnxruntime"
OPENVINO = "benchmarks.suite.backends:OpenVino"
MAKERS = "benchmarks.suite.makers"

FLOAT = "ONNX Runtime float"
EAGER = "PyTorch eager"

RIVALS: tuple[Rival, ...] = (
    Rival(name=EAGER, environment="torch", takes="module", backend="benchmarks.suite.backends:TorchEager"),
    Rival(name=FLOAT, environment="onnxruntime", backend=ORT),
    Rival(
        name="ONNX Runtime static int8",
        environment="onnxruntime",
        maker=f"{MAKERS}.onnxruntime:static_int8",
        backend=ORT,
    ),
    Rival(
        name="ONNX Runtime dynamic int8",
        environment="onnxruntime",
        maker=f"{MAKERS}.onnxruntime:dynamic_int8",
        backend=ORT,
    ),
    Rival(
        name="transformers.exporters ONNX float",
        environment="torch",
        maker=f"{MAKERS}.transformers:onnx_float",
        takes="checkpoint",
        backend=ORT,
    ),
    Rival(
        name="transformers.exporters ONNX static int8",
        environment="torch",
        maker=f"{MAKERS}.transformers:onnx_static",
        takes="checkpoint",
        backend=ORT,
    ),
    Rival(
        name="transformers.exporters ONNX dynamic int8",
        environment="torch",
        maker=f"{MAKERS}.transformers:onnx_dynamic",
        takes="checkpoint",
        backend=ORT,
    ),
    Rival(
        name="transformers.exporters ONNX NNCF int8",
        environment="torch",
        maker=f"{MAKERS}.transformers:onnx_nncf",
        takes="checkpoint",
        backend=ORT,
    ),
    Rival(
        name="transformers.exporters OpenVINO NNCF int8",
        environment="torch",
        maker=f"{MAKERS}.transformers:openvino_nncf",
        takes="checkpoint",
        backend=OPENVINO,
    ),
    Rival(
        name="optimum-onnx static int8",
        environment="optimum",
        maker=f"{MAKERS}.optimum:static_int8",
        backend=ORT,
    ),
    Rival(
        name="optimum-onnx dynamic int8",
        environment="optimum",
        maker=f"{MAKERS}.optimum:dynamic_int8",
        backend=ORT,
    ),
    Rival(
        name="OpenVINO float (defaults)",
        environment="openvino",
        maker=f"{MAKERS}.openvino:as_float",
        backend=OPENVINO,
    ),
    Rival(
        name="OpenVINO float (f32 hint)",
        environment="openvino",
        maker=f"{MAKERS}.openvino:as_float",
        backend=OPENVINO,
        entries={"INFERENCE_PRECISION_HINT": "f32"},
    ),
    Rival(
        name="OpenVINO NNCF int8",
        environment="openvino",
        maker=f"{MAKERS}.openvino:nncf_int8",
        backend=OPENVINO,
    ),
    Rival(
        name="Olive static int8",
        environment="olive",
        maker=f"{MAKERS}.olive:static_int8",
        backend=ORT,
    ),
    Rival(
        name="Olive dynamic int8",
        environment="olive",
        maker=f"{MAKERS}.olive:dynamic_int8",
        backend=ORT,
    ),
    Rival(name="torch.compile", environment="torch", takes="module", backend="benchmarks.suite.backends:TorchCompile"),
)


def rivals_named(names: Sequence[str], *, environment: str = "") -> tuple[Rival, ...]:
    """Those whose names hold one of ``names``, ignoring case; all where there is none. Float is always among them."""
    found = [each for each in RIVALS if not environment or each.environment == environment]
    wanted = [name.lower() for name in names]
    return tuple(
        each for each in found if not wanted or each.name == FLOAT or any(name in each.name.lower() for name in wanted)
    )
