"""TinyViT-5M (arXiv:2207.10666, MIT; timm's code, Apache-2.0) with random weights. Runs in the environment ``timm``.

timm imports torchvision, whose usual build registers operators that a CPU torch does not know. Declaring them first is
enough: nothing here calls them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.suite.spec import Made, MakeRequest

WEIGHTS = "weights.safetensors"


def export(request: MakeRequest) -> Made:
    """Maker: ``model.onnx`` with ``pixel_values`` and ``image_embeds``, and the weights for PyTorch.

    ``request.calibration`` holds the pictures whose statistics batch norms take.
    """
    import torch
    from safetensors.torch import save_model

    from benchmarks.suite.random_weights import settle

    torch.manual_seed(0)
    model = _create()
    with np.load(request.calibration, allow_pickle=False) as archive:
        pixel_values = archive["pixel_values"]
    settle(model, pixel_values)
    out = Path(request.out)
    save_model(model, str(out / WEIGHTS))
    torch.onnx.export(
        model,
        (torch.from_numpy(pixel_values[:1]),),
        out / "model.onnx",
        input_names=["pixel_values"],
        output_names=["image_embeds"],
        dynamo=True,
        opset_version=20,
        external_data=False,
    )
    return Made(file="model.onnx")


def load(folder: Path) -> Any:
    """The module with the weights that ``export`` wrote."""
    from safetensors.torch import load_model

    model = _create()
    load_model(model, str(folder / WEIGHTS))
    return _named(model)


def _create() -> Any:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    # Without its classifier it gives the vector before it. The library object must outlive the model.
    model = timm.create_model("tiny_vit_5m_224", pretrained=False, num_classes=0).eval()
    model.declared = library
    return model


def _named(model: Any) -> Any:
    import torch

    class Named(torch.nn.Module):
        """Takes the picture by its name, as the exported graph does."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> Any:
            return self.model(pixel_values)

    return Named()
