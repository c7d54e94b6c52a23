"""What a user would run instead, behind the runtime's backend interface, so that a measuring worker can open it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.runtime.spec import Array, SessionOptions, TensorSpec

RESNET_56 = "resnet56-cifar"


class TorchEager:
    """PyTorch as it comes: float32, eager, inference mode.

    ``file`` is a Hugging Face folder of an image classifier, or ``resnet56-cifar``: the architecture of He et al.,
    arXiv:1512.03385, section 4.2, with random weights, for which latency does not depend on their values.
    """

    name = "torch-eager"

    def version(self) -> str | None:
        import torch

        return str(torch.__version__)

    def open(self, file: Path, options: SessionOptions) -> TorchEagerSession:
        import torch

        torch.set_num_threads(options.n_threads or torch.get_num_threads())
        if file.name == RESNET_56:
            return TorchEagerSession(_resnet56())
        import transformers

        return TorchEagerSession(transformers.AutoModelForImageClassification.from_pretrained(file).eval())


class TorchEagerSession:
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, module: Any) -> None:
        self._module = module

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        (pixel_values,) = feeds.values()
        with torch.inference_mode():
            output = self._module(torch.from_numpy(pixel_values))
        return {"logits": getattr(output, "logits", output).numpy()}


def _resnet56() -> Any:
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, n_in: int, n_out: int) -> None:
            super().__init__()
            stride = 1 if n_in == n_out else 2
            self.first = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
            self.first_norm = nn.BatchNorm2d(n_out)
            self.second = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
            self.second_norm = nn.BatchNorm2d(n_out)
            self.n_padding = (n_out - n_in) // 2

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.second_norm(self.second(functional.relu(self.first_norm(self.first(x)))))
            if self.n_padding:  # option A: every second pixel, padded with zero channels
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.n_padding, self.n_padding))
            return functional.relu(x + y)

    widths = [16] * 9 + [32] * 9 + [64] * 9
    blocks = [Block(n_in, n_out) for n_in, n_out in zip([16, *widths[:-1]], widths, strict=True)]
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    torch.manual_seed(0)
    return nn.Sequential(stem, *blocks, head).eval()
