"""A PyTorch module made by a function of the user's own, ``package.module:factory``, with a card beside its source.

The only kind whose reading runs code and imports torch: nobody knows a factory's weights without calling it. Its
digest covers the factory's name, the weights and layers that it returns, and the source of what computes them.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from edgevlm.errors import EdgeVLMError, ModelError, UsageError, did_you_mean
from edgevlm.families.loading import checked, first_line, import_torch
from edgevlm.ingest.asked import Asked
from edgevlm.ingest.card import card_outputs, card_processing, find_card, read_card, whole_processing
from edgevlm.ingest.hugging_face import digest_of
from edgevlm.ingest.onnx_file import labels_of
from edgevlm.ingest.weights import sha256_of
from edgevlm.model import Graph, Model, Source
from edgevlm.runtime.spec import TensorSpec


def read_torch_module(asked: Asked) -> Model:
    """A model from ``package.module:factory`` and its card.

    Raises: UsageError: there is no such function. ModelError: it fails, or does not return a module.
    """
    source_file = Path(str(import_factory(asked.name)[0].__file__))
    card_file = find_card(source_file, asked.card)
    card = read_card(card_file)
    if asked.task not in (None, card.task):
        raise UsageError(f"'{card_file}' says {card.task}, not {asked.task}.", hint=f"Use --task {card.task}.")
    module = make_module(asked.name)
    image = card_processing(card, where=asked.name, graph_size=(None, None), image_size=asked.image_size)
    labels = labels_of(asked, card, card_file, None)
    pixel_values = TensorSpec(name=image.input_name, dtype="float32", shape=("batch", 3, image.height, image.width))
    outputs = card_outputs(card)
    graphs = (Graph(name="model", inputs=(pixel_values,), outputs=outputs),)
    options = {"outputs": {name: card.outputs.get(name) for name in outputs}}
    weights_sha256 = _weights_sha256(module)
    processing = whole_processing(card, card_file, image)
    source = Source(
        kind=asked.kind,
        location=asked.name,
        asked=asked.name,
        digest=digest_of([weights_sha256, *_code(asked.name, module)], card.task, graphs, processing, options, labels),
        weights_sha256=weights_sha256,
        licence=card.licence,
        options=options,
    )
    return Model(
        name=card.name or asked.name.partition(":")[2],
        task=card.task,
        family="torch_module",
        graphs=graphs,
        processing=processing,
        source=source,
        labels=labels,
    )


def import_factory(name: str) -> tuple[ModuleType, Any]:
    """The Python module and the function of ``package.module:function``, found as ``python -m`` would find it.

    Raises: UsageError: there is none.
    """
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"'{module_name}' of '{name}' cannot be imported: {error}.",
            hint="Run edgevlm in the folder that holds the package, or install it.",
        ) from error
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"Importing '{module_name}' failed: {_told(error)}", hint="Mend the module.") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        names = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
        raise UsageError(f"'{module_name}' has no function '{attribute}'.", hint=did_you_mean(attribute, names))
    return module, factory


def make_module(name: str) -> Any:
    """What the factory returns, in evaluation mode and checked. Seeded, so that random weights are the same each time.

    Raises: ModelError: the factory fails, or returns something else than a ``torch.nn.Module``.
    """
    torch = import_torch()
    factory = import_factory(name)[1]
    torch.manual_seed(0)
    try:
        module = factory()
    except EdgeVLMError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"'{name}' failed: {_told(error)}", hint="Call it in Python to see where.") from error
    if not isinstance(module, torch.nn.Module):
        raise ModelError(
            f"'{name}' returned a {type(module).__name__}, where a torch.nn.Module is expected.",
            hint="Name a function without arguments that returns the model with its weights.",
        )
    return checked(module.float(), name)


def _weights_sha256(module: Any) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


def _code(name: str, module: Any) -> list[str]:
    """What decides, beside the weights, what ``module`` computes: two factories of one file are two models."""
    layers = re.sub(r" at 0x[0-9a-f]+", "", repr(module))
    return [name, layers, *(sha256_of(file) for file in _sources(name, module))]


def _sources(name: str, module: Any) -> list[Path]:
    """The files of the factory's package, of every layer's class, and of what these import from the same project.

    torch is left out: its version is part of every key.
    """
    start = name.partition(":")[0]
    package = start.partition(".")[0]
    project = _file_of(start).parents[start.count(".") + hasattr(sys.modules[start], "__path__")]
    kinds = {kind.__module__ for layer in module.modules() for kind in type(layer).__mro__}
    waiting = [known for known in sys.modules if known == package or known.startswith(f"{package}.")]
    waiting += [known for known in kinds if known.partition(".")[0] != "torch"]
    found: dict[str, Path] = {}
    while waiting:
        known = waiting.pop()
        if known in found or (file := _file_of(known)).suffix != ".py":
            continue
        found[known] = file
        imported = {_module_of(value) for value in vars(sys.modules[known]).values()}
        waiting += [other for other in imported if _is_inside(project, _file_of(other))]
    return [found[known] for known in sorted(found)]


def _is_inside(project: Path, file: Path) -> bool:
    return file.is_relative_to(project) and "site-packages" not in file.parts


def _file_of(module_name: str) -> Path:
    return Path(getattr(sys.modules.get(module_name), "__file__", None) or "").resolve()


def _module_of(value: Any) -> str:
    found = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return found if isinstance(found, str) else ""


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
