"""edgevlm: a compiler that takes vision and vision-language models to edge hardware.

One function per verb of the command line; nothing heavy is imported before one is called.

    >>> import edgevlm
    >>> compiled = edgevlm.compile("demo", target="cpu")  # doctest: +SKIP
    >>> edgevlm.run(compiled.bundle, "picture.jpg").to_text()  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# ONNX Runtime starts a thread that reports home as soon as it is imported, and only this keeps it from it; what the
# user has set stays. It must be there before the first import, wherever that is.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from edgevlm import cache as cache
    from edgevlm import targets as targets
    from edgevlm.building import build as build
    from edgevlm.compiler import compile as compile
    from edgevlm.compiler import prepare as prepare
    from edgevlm.diagnosis import doctor as doctor
    from edgevlm.distillation.distill import distill as distill
    from edgevlm.evaluation.evaluation import evaluate_bundle as evaluate
    from edgevlm.measure.bundles import benchmark_bundles as benchmark
    from edgevlm.quantization.qat import quantize_model as quantize
    from edgevlm.runtime.pipeline import Pipeline as Pipeline
    from edgevlm.runtime.verify import verify_bundle as verify
    from edgevlm.tuning import tune as tune
    from edgevlm.verbs import inspect as inspect
    from edgevlm.verbs import run as run

# Public name -> where it stands ("module" or "module:attribute").
_PUBLIC = {
    "Pipeline": "edgevlm.runtime.pipeline:Pipeline",
    "benchmark": "edgevlm.measure.bundles:benchmark_bundles",
    "build": "edgevlm.building:build",
    "cache": "edgevlm.cache",
    "compile": "edgevlm.compiler:compile",
    "distill": "edgevlm.distillation.distill:distill",
    "doctor": "edgevlm.diagnosis:doctor",
    "evaluate": "edgevlm.evaluation.evaluation:evaluate_bundle",
    "inspect": "edgevlm.verbs:inspect",
    "prepare": "edgevlm.compiler:prepare",
    "quantize": "edgevlm.quantization.qat:quantize_model",
    "run": "edgevlm.verbs:run",
    "targets": "edgevlm.targets",
    "tune": "edgevlm.tuning:tune",
    "verify": "edgevlm.runtime.verify:verify_bundle",
}

__all__ = [
    "Pipeline",
    "__version__",
    "benchmark",
    "build",
    "cache",
    "compile",
    "distill",
    "doctor",
    "evaluate",
    "inspect",
    "prepare",
    "quantize",
    "run",
    "targets",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'edgevlm' has no attribute '{name}'")
    module, _, attribute = _PUBLIC[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return __all__
