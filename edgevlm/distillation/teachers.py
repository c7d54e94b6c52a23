"""The models that teach: any that edgevlm reads, asked for outputs by name.

A checkpoint or a module runs in PyTorch as its family calls it; an ONNX file in ONNX Runtime, without PyTorch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgevlm.errors import ModelError, UsageError
from edgevlm.model import Graph, Model
from edgevlm.plan import TEXT_ENCODER
from edgevlm.runtime.spec import Array, Processing
from edgevlm.runtime.text import load_tokenizer, tokenize

Arrays = dict[str, Array]

_TEXT_NAMES = frozenset({"text_embeds", "text_features"})
# Vectors of whole pictures have one name here, whatever the family's graph calls them.
_NAMES = {"pooler_output": "image_embeds"}
_PREFIXES = (0, 1, 2, 5)
"""Tokens before those of the patches: none, a class token, DeiT's two, DINOv2's with four registers."""


class Teacher(Protocol):
    """A model that answers for pictures and texts."""

    @property
    def model(self) -> Model: ...

    @property
    def digest(self) -> str:
        """sha256 of what decides its outputs: weights, configuration, processing, tokenizer."""
        ...

    @property
    def processing(self) -> Processing: ...

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Everything that it can give: the shape of one row by output."""
        ...

    def outputs(self, pixel_values: Array, names: frozenset[str]) -> Arrays:
        """What it says of pictures; of ``names`` those that it has.

        Shapes: pixel_values [n, 3, height, width]; logits [n, classes], image_embeds [n, d] or [n, d, h, w],
            image_features [n, d, h, w] before pooling.
        """
        ...

    def text_outputs(self, texts: Sequence[str], names: frozenset[str]) -> Arrays:
        """What it says of texts; of ``names`` those that it has.

        Shapes: text_embeds [m, d], text_features [m, length, d].
        """
        ...


def named(output: str) -> str:
    """What a graph's output is called here."""
    return _NAMES.get(output, output)


def teacher_of(model: Model, *, device: str = "cpu") -> Teacher:
    """The teacher that ``model`` is.

    Args: device: of PyTorch; an ONNX file runs on the CPU.
    """
    return TorchTeacher(model, device=device) if model.family else OnnxTeacher(model)


class _Base(ABC):
    def __init__(self, model: Model) -> None:
        self.model = model
        self._sizes: dict[str, tuple[int, ...]] | None = None

    @property
    def digest(self) -> str:
        return self.model.source.digest

    @property
    def processing(self) -> Processing:
        return self.model.processing

    def sizes(self) -> dict[str, tuple[int, ...]]:
        if self._sizes is None:
            image = self.processing.image
            given = self._all_outputs(np.zeros((1, 3, image.height, image.width), np.float32))
            if self.processing.text is not None:
                given |= self.text_outputs(["a"], _TEXT_NAMES)
            self._sizes = {name: tuple(value.shape[1:]) for name, value in given.items()}
        return self._sizes

    def outputs(self, pixel_values: Array, names: frozenset[str]) -> Arrays:
        return {name: value for name, value in self._all_outputs(pixel_values).items() if name in names}

    def text_outputs(self, texts: Sequence[str], names: frozenset[str]) -> Arrays:
        return {}

    @abstractmethod
    def _all_outputs(self, pixel_values: Array) -> Arrays: ...


class OnnxTeacher(_Base):
    """An ONNX file with its card."""

    def __init__(self, model: Model) -> None:
        from edgevlm.export import open_source

        super().__init__(model)
        self._session = open_source(model, model.graphs[0].name)

    def _all_outputs(self, pixel_values: Array) -> Arrays:
        found = self._session.run({self.processing.image.input_name: pixel_values})
        return {named(name): value for name, value in found.items()}


class TorchTeacher(_Base):
    """A checkpoint of Transformers, or a module of the user's."""

    def __init__(self, model: Model, *, device: str = "cpu") -> None:
        from edgevlm.families import load_family
        from edgevlm.families.loading import import_torch, load_module

        super().__init__(model)
        self._torch = import_torch()
        self._device = device
        self._family = load_family(model.family)
        # The module that export and judging share stays where it is.
        self.module: Any = load_module(model) if device == "cpu" else self._family.load(model).to(device)
        self._tokenizer: Any = None

    @property
    def is_on_cpu(self) -> bool:
        return self._device == "cpu"

    @property
    def n_threads(self) -> int:
        """That it computes with on a CPU."""
        return int(self._torch.get_num_threads())

    def _all_outputs(self, pixel_values: Array) -> Arrays:
        found: dict[str, Any] = {}
        with _Listening(self._tower("vision_model")) as heard:
            for graph in self.picture_graphs():
                found |= self._call(graph, pixel_values)
        hidden = heard.state if heard.state is not None else found.get("last_hidden_state")
        given = {named(name): value for name, value in found.items() if name != "last_hidden_state"}
        if hidden is not None and (features := self._map(hidden)) is not None:
            given["image_features"] = features
        return {name: value.float().cpu().numpy() for name, value in given.items()}

    def text_outputs(self, texts: Sequence[str], names: frozenset[str]) -> Arrays:
        graph = next((graph for graph in self.model.graphs if graph.name == TEXT_ENCODER), None)
        text = self.processing.text
        if graph is None or text is None:
            return {}
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(Path(self.model.tokenizer_file), text)
        tokens = tokenize(texts, self._tokenizer, text)
        with _Listening(self._tower("text_model")) as heard:
            found = self._call(graph, *(tokens[spec.name] for spec in graph.inputs))
        if heard.state is not None:
            found["text_features"] = heard.state
        return {name: value.float().cpu().numpy() for name, value in found.items() if name in names}

    def picture_graphs(self) -> tuple[Graph, ...]:
        """Those that a picture alone goes into."""
        alone = (self.processing.image.input_name,)
        return tuple(graph for graph in self.model.graphs if tuple(spec.name for spec in graph.inputs) == alone)

    def _call(self, graph: Graph, *inputs: Array) -> dict[str, Any]:
        tensors = [self._torch.tensor(value, device=self._device) for value in inputs]
        with self._torch.inference_mode():
            return dict(zip(graph.outputs, self._family.call(self.module, graph.name, *tensors), strict=True))

    def _tower(self, name: str) -> Any:
        """The part that ends in what is pooled; None where nobody knows it."""
        tower = getattr(self.module, name, None)
        return tower if tower is not None or name != "vision_model" else getattr(self.module, "base_model", None)

    def _map(self, hidden: Any) -> Any:
        """Tokens back in their places: [n, d, h, w]; None where they are no grid."""
        if hidden.ndim == 4:
            return hidden
        if hidden.ndim != 3:
            return None
        n, n_tokens, width = hidden.shape
        grid = self._grid(n_tokens)
        if grid is None:
            return None
        return hidden[:, n_tokens - grid[0] * grid[1] :].transpose(1, 2).reshape(n, width, *grid)

    def _grid(self, n_tokens: int) -> tuple[int, int] | None:
        image = self.processing.image
        config = getattr(self.module, "config", None)
        patch = getattr(getattr(config, "vision_config", config), "patch_size", None)
        if isinstance(patch, int):
            grid = image.height // patch, image.width // patch
            if n_tokens - math.prod(grid) in _PREFIXES:
                return grid
        for n_before in _PREFIXES:
            side = math.isqrt(max(n_tokens - n_before, 0))
            if side and side * side == n_tokens - n_before and image.height == image.width:
                return side, side
        return None


class _Listening:
    """Keeps a tower's ``last_hidden_state`` while the block runs: the state that pooling reads."""

    def __init__(self, tower: Any) -> None:
        self.state: Any = None
        self._tower = tower
        self._handle: Any = None

    def __enter__(self) -> _Listening:
        if self._tower is not None:
            self._handle = self._tower.register_forward_hook(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _hear(self, _module: Any, _inputs: Any, output: Any) -> None:
        state = getattr(output, "last_hidden_state", None)
        self.state = state if state is not None else self.state


def check_outputs(teacher: Teacher, names: frozenset[str]) -> None:
    """Raises: UsageError: the teacher does not give what the recipe needs of it."""
    missing = sorted(names - teacher.sizes().keys())
    if missing:
        raise UsageError(
            f"The recipe needs '{missing[0]}' of the teacher '{teacher.model.name}', which gives "
            f"{', '.join(sorted(teacher.sizes()))}.",
            hint="Take another recipe, or another teacher.",
        )


def need_finite_outputs(teacher: Teacher, outputs: Mapping[str, Array]) -> None:
    """Raises: ModelError: an output is not a number."""
    for name, value in outputs.items():
        if not np.isfinite(value).all():
            raise ModelError(
                f"The teacher '{teacher.model.name}' gives '{name}' with values that are NaN or infinite.",
                hint="Use another teacher, or check its weights and preprocessing.",
            )
