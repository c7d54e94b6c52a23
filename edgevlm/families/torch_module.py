"""A PyTorch module of the user's own: called with the picture, its outputs named by its card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgevlm.errors import ModelError
from edgevlm.families import Family
from edgevlm.model import Model


class TorchModule(Family):
    def load(self, model: Model) -> Any:
        from edgevlm.ingest.torch_module import make_module

        module = make_module(model.source.location)
        if weights := model.source.options.get("weights"):  # fine-tuned ones instead of the factory's own
            from safetensors.torch import load_file

            module.load_state_dict(load_file(weights))
        module.edgevlm_outputs = dict(model.source.options["outputs"])
        return module

    def call(self, module: Any, graph: str, *inputs: Any) -> tuple[Any, ...]:
        """The outputs that the card names, from a tensor, a tuple in the card's order, or a mapping."""
        got = module(*inputs)
        names: dict[str, str | None] = module.edgevlm_outputs
        if hasattr(got, "shape"):
            got = (got,)
        if isinstance(got, Mapping):
            missing = [name or ours for ours, name in names.items() if (name or ours) not in got]
            if missing:
                raise ModelError(
                    f"The module gives {', '.join(map(repr, got))}, and not '{missing[0]}'.",
                    hint="Map the task's outputs to the module's in the card's [outputs].",
                )
            return tuple(got[name or ours] for ours, name in names.items())
        if not isinstance(got, tuple | list) or len(got) < len(names):
            raise ModelError(
                f"The module returned a {type(got).__name__}, where {len(names)} tensors are expected.",
                hint="Return a tensor, a tuple of tensors or a dict of tensors.",
            )
        return tuple(got[: len(names)])
