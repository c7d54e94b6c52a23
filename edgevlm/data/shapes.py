"""The built-in data set: coloured shapes, with labels, captions, boxes, masks and questions.

Every picture is computed from ``(seed, index)`` by integers alone: a splitmix64 generator and a
rasteriser that samples pixel centres in integer arithmetic. No float and no library's random
generator decides a pixel, so the pixels are the same bytes on every machine. A scene is laid out
in 1024ths of the picture's side, so one ``(seed, index)`` shows the same scene at every size.

A split is a seed: pictures of different seeds share nothing but their distribution.
``HELD_OUT_PAIRS`` are the colour-shape pairs that the demo model's training never shows.

Source: splitmix64 is Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators",
OOPSLA 2014.
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal, TypeAlias, TypeVar, overload

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]
Integers: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]
Color: TypeAlias = tuple[int, int, int]
Box: TypeAlias = tuple[int, int, int, int]
Pair: TypeAlias = tuple[str, str]
Pairs: TypeAlias = Literal["all", "seen", "held_out"]
Layout: TypeAlias = Literal["folders", "csv"]
T = TypeVar("T")

_RGB: Final[dict[str, Color]] = {
    "red": (214, 40, 40),
    "orange": (240, 135, 25),
    "yellow": (240, 220, 50),
    "green": (45, 155, 60),
    "cyan": (60, 205, 215),
    "blue": (40, 80, 210),
    "purple": (125, 50, 165),
    "pink": (240, 130, 190),
}

_UNIT: Final = 1024
"""A picture's side in the units that lay out a scene, and a shape's radius in its own."""


def _circle(x: Integers, y: Integers) -> Mask:
    return x * x + y * y <= _UNIT * _UNIT


def _square(x: Integers, y: Integers) -> Mask:
    return (np.abs(x) <= 724) & (np.abs(y) <= 724)


def _triangle(x: Integers, y: Integers) -> Mask:
    return (y <= 512) & (887 * (y + _UNIT) >= 1536 * np.abs(x))


def _diamond(x: Integers, y: Integers) -> Mask:
    # Narrower than tall: with equal diagonals it would be the square, turned.
    reach: Integers = 3 * np.abs(x) + 2 * np.abs(y)
    return reach <= 2 * _UNIT


def _cross(x: Integers, y: Integers) -> Mask:
    across, down = np.abs(x), np.abs(y)
    return (np.minimum(across, down) <= 300) & (np.maximum(across, down) <= 970)


def _star(x: Integers, y: Integers) -> Mask:
    # A pentagram holds the points on the inner side of at least four of its five lines.
    normals = ((0, -1024), (974, -316), (602, 828), (-602, 828), (-974, -316))
    inner = [(a * x + b * y <= 316 * _UNIT).astype(np.int64) for a, b in normals]
    return sum(inner[1:], start=inner[0]) >= 4


def _ring(x: Integers, y: Integers) -> Mask:
    return _circle(x, y) & (x * x + y * y >= 620 * 620)


def _crescent(x: Integers, y: Integers) -> Mask:
    return _circle(x, y) & ((x - 450) ** 2 + y * y > 800 * 800)


_INSIDE: Final[dict[str, Callable[[Integers, Integers], Mask]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "star": _star,
    "ring": _ring,
    "crescent": _crescent,
}
"""Each shape as a test of points, in 1024ths of its radius, y pointing down."""

COLORS: Final = tuple(_RGB)
SHAPES: Final = tuple(_INSIDE)
PAIRS: Final[tuple[Pair, ...]] = tuple((color, shape) for color in COLORS for shape in SHAPES)
HELD_OUT_PAIRS: Final[tuple[Pair, ...]] = tuple(
    # 3 and 8 are coprime: each colour and each shape is held out exactly once.
    (color, SHAPES[(3 * i + 1) % len(SHAPES)])
    for i, color in enumerate(COLORS)
)
PROMPT_TEMPLATE: Final = "a photo of a {label}"
"""Turns a class name into the text that the demo model scores it by."""
MAX_OBJECTS: Final = 8
MIN_SIZE: Final = 32
MAX_SIZE: Final = 2048

_PAIRS_BY_NAME: Final[dict[Pairs, tuple[Pair, ...]]] = {
    "all": PAIRS,
    "seen": tuple(pair for pair in PAIRS if pair not in HELD_OUT_PAIRS),
    "held_out": HELD_OUT_PAIRS,
}
_TURNS: Final = ((998, -230), (1014, -143), (1024, 0), (1014, 143), (998, 230))
"""(cosine, sine) in 1024ths of -13, -8, 0, 8 and 13 degrees."""
_N_CELLS: Final = 32
"""Background texture comes in this many cells a side, at every picture size."""
_MIN_CONTRAST: Final = 130
"""Least summed channel difference between an object and the background it lies on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shape:
    """One object of a picture.

    Shapes: ``mask`` [size, size].
    Units:  ``box`` is (x0, y0, x1, y1) in pixels, x1 and y1 one past the last pixel.
    """

    color: str
    shape: str
    box: Box
    mask: Mask

    @property
    def label(self) -> str:
        """The class name, such as ``red circle``."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A generated picture and everything that is true of it; the first object is the primary one.

    Shapes: ``image`` [size, size, 3], RGB.
    """

    image: Bytes
    objects: tuple[Shape, ...]
    caption: str
    label: str
    questions: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Pictures(Sequence[Picture]):
    """A split: ``n`` pictures of one seed, each computed when it is asked for.

    Example:
        >>> split = Pictures(n=100, seed=7, pairs="seen")
        >>> len(split), split[0].label
        (100, 'orange square')
    """

    n: int
    seed: int
    size: int = 64
    pairs: Pairs = "all"
    n_objects: int | tuple[int, int] = 1

    def __len__(self) -> int:
        return self.n

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Picture, ...]: ...
    def __getitem__(self, index: int | slice) -> Picture | tuple[Picture, ...]:
        if isinstance(index, slice):
            return tuple(self._at(i) for i in range(self.n)[index])
        return self._at(range(self.n)[index])

    def __iter__(self) -> Iterator[Picture]:
        return (self._at(i) for i in range(self.n))

    def _at(self, index: int) -> Picture:
        return picture(index, seed=self.seed, size=self.size, pairs=self.pairs, n_objects=self.n_objects)


def class_names(pairs: Pairs = "all") -> tuple[str, ...]:
    """Name the classes, ``color shape``, in the order of ``PAIRS``.

    Example:
        >>> class_names()[:2], len(class_names("seen"))
        (('red circle', 'red square'), 56)
    """
    return tuple(f"{color} {shape}" for color, shape in _PAIRS_BY_NAME[pairs])


def picture(
    index: int,
    *,
    seed: int,
    size: int = 64,
    pairs: Pairs = "all",
    n_objects: int | tuple[int, int] = 1,
) -> Picture:
    """Draw picture ``index`` of the split ``seed``.

    Args:
        pairs: which colour-shape pairs may appear; no pair appears twice in a picture.
        n_objects: how many objects, or the (least, most) to draw the number from. Objects never
            overlap.
    Units:   ``size`` is the side in pixels.
    Raises:  ValueError: ``index`` is negative, or ``size`` or ``n_objects`` is out of range.
    Example:
        >>> shown = picture(0, seed=1, n_objects=2)
        >>> shown.image.shape, shown.caption
        ((64, 64, 3), 'a green triangle and a pink crescent')
    """
    least, most = (n_objects, n_objects) if isinstance(n_objects, int) else n_objects
    if not 1 <= least <= most <= MAX_OBJECTS:
        raise ValueError(f"n_objects is {n_objects}, expected 1 to {MAX_OBJECTS}, least first")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"size is {size}, expected {MIN_SIZE} to {MAX_SIZE} pixels")
    if index < 0:
        raise ValueError(f"index is {index}, expected 0 or more")
    draws = _Draws(seed, index)
    chosen = draws.sample(_PAIRS_BY_NAME[pairs], draws.between(least, most))
    paints = tuple(_paint(draws, color) for color, _ in chosen)
    image = _background(draws, size=size, paints=paints)
    objects = []
    for (color, shape), paint, place in zip(chosen, paints, _places(draws, len(chosen)), strict=True):
        mask = _mask(shape, place, size=size, turn=draws.choice(_TURNS))
        image[mask] = paint
        objects.append(Shape(color=color, shape=shape, box=_box(mask), mask=mask))
    return Picture(
        image=_with_grain(draws, image),
        objects=tuple(objects),
        caption=_caption(objects),
        label=objects[0].label,
        questions=_questions(draws, objects),
    )


def shuffle_pixels(image: Bytes, *, seed: int, across_channels: bool) -> Bytes:
    """Permute a picture's pixels, to measure what a model knows without seeing shapes.

    Args:
        across_channels: permute all H*W*C values, so that neither shape nor hue is left; otherwise
            move whole pixels, so that the colour histogram stays and only shape is lost.
    """
    flat = image.reshape(-1) if across_channels else image.reshape(-1, image.shape[-1])
    order = np.argsort(_Draws(seed, 0).words(len(flat)), kind="stable")
    return flat[order].reshape(image.shape)


def write_folder(
    path: Path,
    *,
    n: int,
    seed: int,
    size: int = 64,
    pairs: Pairs = "all",
    n_objects: int | tuple[int, int] = 1,
    layout: Layout = "folders",
) -> None:
    """Write a split as PNG files, whole or not at all.

    Args:
        layout: ``folders`` writes ``LABEL/000000.png``; ``csv`` writes ``images/000000.png`` and
            ``labels.csv`` with the columns image, label and caption.
    Raises:  FileExistsError: ``path`` is there already.
    """
    from PIL import Image

    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; name a new folder")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        rows = []
        split = Pictures(n=n, seed=seed, size=size, pairs=pairs, n_objects=n_objects)
        for i, shown in enumerate(split):
            name = f"{shown.label if layout == 'folders' else 'images'}/{i:06d}.png"
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(shown.image).save(unfinished / name)
            rows.append((name, shown.label, shown.caption))
        if layout == "csv":
            with (unfinished / "labels.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("image", "label", "caption"), *rows])
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class _Draws:
    """A splitmix64 stream keyed by a split's seed and a picture's index."""

    _MODULUS: Final = 1 << 64
    _GAMMA: Final = 0x9E3779B97F4A7C15
    _MIX_1: Final = 0xBF58476D1CE4E5B9
    _MIX_2: Final = 0x94D049BB133111EB

    def __init__(self, seed: int, index: int) -> None:
        # Seeds and indexes are mixed one after the other, or (seed, index) and (seed + 1, index - 1)
        # would start streams that overlap.
        self._state = self._mixed((self._mixed(seed + self._GAMMA) + index) * self._GAMMA)

    @classmethod
    def _mixed(cls, value: int) -> int:
        value %= cls._MODULUS
        value = (value ^ (value >> 30)) * cls._MIX_1 % cls._MODULUS
        value = (value ^ (value >> 27)) * cls._MIX_2 % cls._MODULUS
        return value ^ (value >> 31)

    def below(self, limit: int) -> int:
        """Draw from 0 to ``limit - 1``."""
        self._state = (self._state + self._GAMMA) % self._MODULUS
        return self._mixed(self._state) * limit >> 64

    def between(self, low: int, high: int) -> int:
        """Draw from ``low`` to ``high``, both included."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], n: int) -> tuple[T, ...]:
        """Draw ``n`` different items, in random order."""
        left = list(items)
        return tuple(left.pop(self.below(len(left))) for _ in range(n))

    def words(self, n: int) -> npt.NDArray[np.uint64]:
        """Draw ``n`` 64-bit words at once; the same stream as ``below`` reads."""
        steps = np.arange(1, n + 1, dtype=np.uint64)
        value = steps * np.uint64(self._GAMMA) + np.uint64(self._state)
        self._state = (self._state + n * self._GAMMA) % self._MODULUS
        value = (value ^ (value >> np.uint64(30))) * np.uint64(self._MIX_1)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(self._MIX_2)
        return value ^ (value >> np.uint64(31))

    def field(self, shape: tuple[int, ...], limit: int) -> Integers:
        """Draw an array of integers from 0 to ``limit - 1``."""
        high = self.words(int(np.prod(shape))) >> np.uint64(32)
        return (high * np.uint64(limit) >> np.uint64(32)).astype(np.int64).reshape(shape)


def _paint(draws: _Draws, color: str) -> Color:
    """A colour as one object wears it: each channel jittered, then all made lighter or darker."""
    light = draws.between(205, 275)
    r, g, b = (min(255, max(0, v + draws.between(-18, 18)) * light >> 8) for v in _RGB[color])
    return r, g, b


def _backdrop(draws: _Draws, paints: Sequence[Color]) -> Integers:
    """A tinted grey that stands off from every paint; near-black always does, so this ends."""
    while True:
        grey = draws.between(16, 239)
        color = [min(255, max(0, grey + draws.between(-28, 28))) for _ in range(3)]
        contrasts = (sum(abs(a - b) for a, b in zip(color, p, strict=True)) for p in paints)
        if min(contrasts) >= _MIN_CONTRAST:
            return np.array(color, dtype=np.int64)


def _background(draws: _Draws, *, size: int, paints: Sequence[Color]) -> Integers:
    """Paint what lies behind the objects: plain, gradient, noise or coloured speckle."""
    kind = draws.choice(("plain", "gradient", "noise", "speckle"))
    first = _backdrop(draws, paints)
    at = np.arange(size, dtype=np.int64)
    if kind == "gradient":
        second = _backdrop(draws, paints)
        down, across = draws.choice(((0, 1), (1, 0), (1, 1), (1, -1)))
        slope = down * at[:, None] + across * at[None, :]
        slope = (slope - slope.min())[..., None]
        blend: Integers = first + (second - first) * slope // int(slope.max())
        return blend
    cells = np.broadcast_to(first, (_N_CELLS, _N_CELLS, 3))
    if kind == "noise":
        cells = cells + draws.field(cells.shape, 81) - 40
    if kind == "speckle":
        # Specks wear the objects' own palette, so that a colour's presence does not name the object.
        palette = np.array([_paint(draws, color) for color in COLORS], dtype=np.int64)
        specks = draws.field((_N_CELLS, _N_CELLS), 4 * len(COLORS))
        is_speck = (specks < len(COLORS))[..., None]
        cells = np.where(is_speck, palette[specks % len(COLORS)], cells)
    cell_of = at * _N_CELLS // size
    background: Integers = cells[cell_of[:, None], cell_of[None, :]]
    return background


def _places(draws: _Draws, n: int) -> Iterable[tuple[int, int, int]]:
    """Give each object (x, y, radius) in a grid cell of its own, in 1024ths of the side."""
    n_across = 1 if n == 1 else 2 if n <= 4 else 3
    cell = _UNIT // n_across
    smallest = 180 if n == 1 else 300
    for i in draws.sample(range(n_across * n_across), n):
        radius = cell * draws.between(smallest, 450) // _UNIT
        x = i % n_across * cell + draws.between(radius, cell - radius)
        y = i // n_across * cell + draws.between(radius, cell - radius)
        yield x, y, radius


def _mask(shape: str, place: tuple[int, int, int], *, size: int, turn: tuple[int, int]) -> Mask:
    """Mark the pixels whose centres lie inside a shape."""
    x, y, radius = place
    # Pixel i has its centre at (2i + 1) * 512 / size units; multiplied by size to stay an integer.
    centres = (2 * np.arange(size, dtype=np.int64) + 1) * (_UNIT // 2)
    dx = ((centres - x * size) * _UNIT // (radius * size))[None, :]
    dy = ((centres - y * size) * _UNIT // (radius * size))[:, None]
    cosine, sine = turn
    return _INSIDE[shape]((dx * cosine + dy * sine) >> 10, (dy * cosine - dx * sine) >> 10)


def _box(mask: Mask) -> Box:
    """The tightest box around a mask."""
    xs, ys = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def _with_grain(draws: _Draws, image: Integers) -> Bytes:
    """Add a sensor's noise, of one strength per picture."""
    strength = draws.between(0, 10)
    grain = draws.field(image.shape, 2 * strength + 1) - strength
    noisy: Bytes = np.clip(image + grain, 0, 255).astype(np.uint8)
    return noisy


def _with_article(label: str) -> str:
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"


def _caption(objects: Sequence[Shape]) -> str:
    names = [_with_article(thing.label) for thing in objects]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _questions(draws: _Draws, objects: Sequence[Shape]) -> tuple[tuple[str, str], ...]:
    """Ask what the picture answers without doubt: presence, number, colour, shape and order."""
    colors = [thing.color for thing in objects]
    shapes = [thing.shape for thing in objects]
    labels = [thing.label for thing in objects]
    absent = draws.choice([name for name in class_names() if name not in labels])
    counted = draws.choice(SHAPES)
    asked = [
        ("how many objects are there?", str(len(objects))),
        (f"how many objects are a {counted}?", str(shapes.count(counted))),
        (f"is there {_with_article(labels[0])}?", "yes"),
        (f"is there {_with_article(absent)}?", "no"),
    ]
    for thing in objects:
        if shapes.count(thing.shape) == 1:
            asked.append((f"what color is the {thing.shape}?", thing.color))
        if colors.count(thing.color) == 1:
            asked.append((f"what shape is the {thing.color} object?", thing.shape))
    for one, other in pairwise(objects):
        is_left, is_right = one.box[2] <= other.box[0], other.box[2] <= one.box[0]
        if is_left or is_right:
            question = f"is the {one.label} left of the {other.label}?"
            asked.append((question, "yes" if is_left else "no"))
    return tuple(asked)
