"""Weights into a ``torch.nn.Module``: from a Hugging Face folder, checked for what is missing or not a number."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from edgevlm.errors import EdgeVLMError, MissingToolError, ModelError
from edgevlm.model import Model


def import_torch() -> Any:
    """torch, or the sentence that says how to get it."""
    try:
        import torch
    except ImportError as error:
        raise MissingToolError(
            "PyTorch is not installed, and compiling a PyTorch model needs it.",
            hint="Run: pip install 'edgevlm[compile]'",
        ) from error
    return torch


@lru_cache(maxsize=1)
def _load_by_digest(family: str, digest: str, encoded: bytes) -> Any:
    from edgevlm.families import load_family
    from edgevlm.runtime.spec import from_json

    return load_family(family).load(from_json(encoded, Model))


def load_module(model: Model) -> Any:
    """The model's module; the last one loaded is kept, since a model's graphs are exported one after another."""
    from edgevlm.runtime.spec import to_json

    return _load_by_digest(model.family, model.source.digest, to_json(model))


def load_checkpoint(model: Model) -> Any:
    """A Transformers model from its folder: float32, eager attention, evaluation mode.

    Raises: ModelError: the folder does not hold every weight of the model, or one is not a number.
    """
    torch = import_torch()
    options = model.source.options
    with quiet():
        import transformers

        name = options["auto_class"] or options["architecture"]
        try:
            module, info = _class_of(options, transformers).from_pretrained(
                model.source.location,
                local_files_only=True,
                trust_remote_code=bool(options["auto_class"]),
                use_safetensors=not options["is_pickle"],
                attn_implementation="eager",
                dtype=torch.float32,
                output_loading_info=True,
                **options.get("load", {}),
            )
        except EdgeVLMError:
            raise
        except Exception as error:  # Transformers and what it calls raise whatever they like for a broken folder
            raise ModelError(
                f"Transformers {transformers.__version__} cannot load '{model.source.asked}': {first_line(error)}",
                hint="Check that the checkpoint is whole and was made for this version of Transformers.",
            ) from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ModelError(
            f"'{model.source.asked}' lacks {len(missing)} of the weights of {name}, the first being '{missing[0]}'.",
            hint="Use a checkpoint that was fine-tuned for this task, or pass the --task that it was trained for.",
        )
    return checked(module, model.source.asked)


def _class_of(options: Mapping[str, Any], transformers: Any) -> Any:
    """Transformers' class, or one of ours: ``class`` is ``module:name``."""
    if "class" not in options:
        return getattr(transformers, options["auto_class"] or options["architecture"])
    module, _, name = options["class"].partition(":")
    return getattr(importlib.import_module(module), name)


def checked(module: Any, asked: str) -> Any:
    """The module in evaluation mode, its weights proven to be numbers.

    Raises: ModelError: one is NaN or infinite; its name is given.
    """
    torch = import_torch()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            n_bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"The weight '{name}' of '{asked}' holds {n_bad} values that are NaN or infinite.",
                hint="Use a checkpoint from before the training diverged.",
            )
    return module.eval().requires_grad_(False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings nor the chatter of libraries; what matters comes back as an error or a value."""
    names = ("torch", "torch.onnx", "torch.export", "transformers", "onnxscript", "onnx_ir")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
