"""Small pictures and data sets for tests."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"red": (230, 30, 30), "green": (30, 230, 30), "blue": (30, 30, 230)}


def png(color: tuple[int, int, int] = (128, 128, 128), *, seed: int = 0, size: int = 16) -> bytes:
    """A noisy picture of one colour; another seed is another picture."""
    noise = np.random.default_rng(seed).integers(-20, 20, (size, size, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, data: bytes) -> Path:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_folders(root: Path, n: Mapping[str, int], *, seed: int = 0) -> Path:
    """``root/class/000.png`` for each class."""
    for c, (name, count) in enumerate(n.items()):
        for i in range(count):
            color = COLORS.get(name, (40 * c % 255, 128, 128))
            write(root / name / f"{i:03d}.png", png(color, seed=1000 * seed + 100 * c + i))
    return root


def write_table(root: Path, header: str, rows: Sequence[str], *, file: str = "labels.csv") -> Path:
    """A table with one picture for each row; the first cell is the picture's name."""
    for i, row in enumerate(rows):
        write(root / "images" / row.replace("\t", ",").split(",")[0], png(seed=i))
    return write(root / file, "\n".join((header, *rows)).encode())
