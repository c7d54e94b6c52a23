"""Weights that a student starts with: the layers of its teacher whose names and shapes are its own.

Source: TinyCLIP, arXiv:2309.12314 (MIT): layers that stand evenly in the teacher, and its embeddings.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def inherit_weights(student: Any, teacher: Any) -> tuple[str, ...]:
    """Copy into ``student`` what fits of ``teacher``, both modules of Transformers.

    Text towers correspond where their names do: evenly spaced layers, embeddings (the first rows where the student's
    texts are shorter), norms and projection. An image tower or a classifier is inherited from one of its own class.

    Returns: what was inherited, a sentence each; nothing where nothing fits.
    """
    import torch

    with torch.no_grad():
        found = [
            *_text_tower(getattr(student, "text_model", None), getattr(teacher, "text_model", None)),
            *_image_tower(student, teacher),
            *_tensors("text projection", student, teacher, ("text_projection.weight",)),
            *_tensors("logit scale", student, teacher, ("logit_scale",)),
        ]
    return tuple(found)


def _image_tower(student: Any, teacher: Any) -> list[str]:
    pair: list[Any] = [getattr(module, "vision_model", None) for module in (student, teacher)]
    if pair == [None, None]:
        pair = [getattr(module, "base_model", module) for module in (student, teacher)]
    ours, theirs = pair
    # Layers of the same names in towers of other classes compute other things.
    if ours is None or type(ours) is not type(theirs):
        return []
    return _tensors("image tower", ours, theirs, tuple(ours.state_dict()))


def _text_tower(student: Any, teacher: Any) -> list[str]:
    if student is None or teacher is None:
        return []
    (name, ours), (their_name, theirs) = _layers(student), _layers(teacher)
    found = []
    if name == their_name and len(ours) <= len(theirs):
        # The first and the last among them; halves go to the even neighbour.
        chosen = [int(i) for i in np.linspace(0, len(theirs) - 1, len(ours)).round()]
        if all(_is_like(a, theirs[i]) for a, i in zip(ours, chosen, strict=True)):
            for layer, i in zip(ours, chosen, strict=True):
                layer.load_state_dict(theirs[i].state_dict())
            numbers = ", ".join(str(i + 1) for i in chosen)
            found.append(f"The text tower's {len(ours)} layers are the teacher's {numbers} of {len(theirs)}.")
    outside = tuple(key for key in student.state_dict() if not key.startswith(f"{name}."))
    return found + _tensors("text tower", student, teacher, outside)


def _layers(tower: Any) -> tuple[str, Any]:
    """The longest list of layers in a tower and its name."""
    import torch

    lists = [(name, part) for name, part in tower.named_modules() if isinstance(part, torch.nn.ModuleList)]
    return max(lists, key=lambda found: len(found[1]), default=("", ()))


def _is_like(ours: Any, theirs: Any) -> bool:
    shapes = [{key: value.shape for key, value in layer.state_dict().items()} for layer in (ours, theirs)]
    return shapes[0] == shapes[1]


def _tensors(what: str, student: Any, teacher: Any, names: tuple[str, ...]) -> list[str]:
    """Tensors of the same names and shapes; of an embedding with more rows, the first."""
    ours, theirs = student.state_dict(), teacher.state_dict()
    whole, cut = [], []
    for name in names:
        if name not in ours or name not in theirs:
            continue
        to, of = ours[name], theirs[name]
        if to.shape == of.shape:
            to.copy_(of)
            whole.append(name)
        elif "position_embedding" in name and to.shape[1:] == of.shape[1:] and len(to) < len(of):
            to.copy_(of[: len(to)])
            cut.append(f"{name} (its first {len(to)} of {len(of)} rows)")
    copied = [*(name for name in whole if ours[name].is_floating_point()), *cut]
    if not copied:
        return []
    n_all = sum(ours[name].is_floating_point() for name in names if name in ours)
    listed = ", ".join(copied) if len(copied) <= 4 else f"{len(copied)} of {n_all} tensors"
    return [f"From the teacher's {what}: {listed}."]
