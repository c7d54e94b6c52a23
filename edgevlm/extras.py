"""What an installation has: the runtime alone, or the compile side with it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

from edgevlm.errors import MissingToolError

# The libraries behind the extra `compile` that its verbs cannot do without.
COMPILE_MODULES = ("torch", "transformers", "onnx", "onnxscript", "jinja2", "matplotlib", "safetensors")
INSTALL_COMPILE = "pip install 'edgevlm[compile]'"
INSTALL_EVALUATE = "pip install 'edgevlm[evaluate]'"


def missing_compile_modules() -> tuple[str, ...]:
    """Modules of the extra `compile` that cannot be found; none is imported to find out."""
    return tuple(name for name in COMPILE_MODULES if importlib.util.find_spec(name) is None)


def require_compile(verb: str) -> None:
    """Raises: MissingToolError: this is a base install, which can run bundles but not make them."""
    missing = missing_compile_modules()
    if missing:
        raise MissingToolError(
            f"`edgevlm {verb}` needs the compile side, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed here.",
            hint=f"Run: {INSTALL_COMPILE}",
        )


def require_library(name: str, what: str) -> None:
    """Raises: MissingToolError: the library that judges detection or segmentation is not installed."""
    if importlib.util.find_spec(name) is None:
        raise MissingToolError(f"{what} needs {name}, which is not installed here.", hint=f"Run: {INSTALL_EVALUATE}")


def silence_telemetry() -> None:
    """Keep the libraries of the compile side from reporting home; what the user has set stays."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")


def tool_versions(*names: str) -> dict[str, str]:
    """Installed versions by distribution name; what is not installed is left out."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
