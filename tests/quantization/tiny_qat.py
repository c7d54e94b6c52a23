"""A convolutional classifier of colours, small enough to fine-tune in a test, and pictures for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

LABELS = ("red", "green", "blue")
SIZE = 16
N_PICTURES = 90


class Colours(nn.Module):
    """Convolutions with batch norms, one of them depthwise, two activations, a residual, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, len(LABELS))

    def forward(self, pixel_values: Tensor) -> Tensor:
        stem = functional.relu6(self.stem_norm(self.stem(pixel_values)))
        inner = functional.silu(self.depthwise_norm(self.depthwise(stem)))
        scores: Tensor = self.head((stem + self.pointwise(inner)).mean((2, 3)))
        return scores


def make() -> Colours:
    """Seeded, with batch norms that have seen something and channels of unequal scale."""
    torch.manual_seed(3)
    net = Colours()
    with torch.no_grad():
        net.stem_norm.weight.copy_(torch.linspace(0.2, 3, 8))
        net.depthwise_norm.weight.copy_(torch.linspace(3, 0.2, 8))
        net.train()
        for _ in range(50):
            net(torch.randn(16, 3, SIZE, SIZE))
    return net.eval()


def write_pictures(folder: Path, n: int = N_PICTURES, *, seed: int = 0) -> Path:
    """Noisy pictures in folders by class; the class is the channel that is a little brighter."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        label = i % len(LABELS)
        values = rng.integers(0, 200, size=(SIZE, SIZE, 3))
        values[:, :, label] += 50
        place = folder / LABELS[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.astype(np.uint8)).save(place / f"{i:04d}.png")
    return folder


class Teacher(nn.Module):
    """Says how much more of each channel there is than on average."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        scores: Tensor = 30 * (pixel_values.mean((2, 3)) - pixel_values.mean((1, 2, 3))[:, None])
        return scores


def make_teacher() -> Teacher:
    return Teacher().eval()
