"""A TensorRT engine as data: how it is built, what it was built from, and where it runs.

An engine belongs to one version of TensorRT, one kind of GPU, one graph and one set of settings; its *card* lies beside
it and says which. TensorRT's flags for the command line: docs.nvidia.com/deeplearning/tensorrt, "Command-Line Programs"
and "Migrating trtexec Usage from TensorRT 10.x to 11.x".
"""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec

from edgevlm.errors import BundleError, ModelError, UsageError
from edgevlm.runtime.hashes import sha256_of
from edgevlm.runtime.spec import Array, Spec, TensorSpec, from_json, to_json

EngineBackend = Literal["tensorrt", "tensorrt-rtx"]
HardwareCompatibility = Literal["none", "ampere+", "same-compute-capability"]
Sizes = tuple[Annotated[int, msgspec.Meta(ge=1)], ...]

# What trtexec calls them. Source: its help, TensorRT 10.6 and 11.
_TRTEXEC_COMPATIBILITY: dict[HardwareCompatibility, str] = {
    "none": "none", "ampere+": "ampere+", "same-compute-capability": "sameComputeCapability"
}  # fmt: skip

_N_VERSION = 3
"""Numbers of a version that both sides must tell: of 10.3.0 and 10.3.1 neither opens the other's engines."""


class ShapeRange(Spec, frozen=True, kw_only=True):
    """The sizes of an input that an engine takes, and those that it is tuned for; all three have the same rank."""

    min: Sizes
    opt: Sizes
    max: Sizes

    def __post_init__(self) -> None:
        if not len(self.min) == len(self.opt) == len(self.max):
            raise ValueError(f"min, opt and max have {len(self.min)}, {len(self.opt)} and {len(self.max)} sizes")
        if any(not low <= best <= high for low, best, high in zip(self.min, self.opt, self.max, strict=True)):
            raise ValueError(f"sizes must not fall from min to opt to max: {self.min}, {self.opt}, {self.max}")

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Whether an input of ``shape`` can be run."""
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )

    def describe(self) -> str:
        """In words: ``1×3×224×224 to 8×3×224×224``."""
        low, high = "×".join(map(str, self.min)), "×".join(map(str, self.max))
        return low if low == high else f"{low} to {high}"


class AskedRange(Spec, frozen=True, kw_only=True):
    """Sizes of an input that were asked for; what is null is chosen where it is known which dimensions are free."""

    min: Sizes | None = None
    opt: Sizes | None = None
    max: Sizes | None = None

    def __post_init__(self) -> None:
        self.as_given()

    def as_given(self) -> ShapeRange:
        """With its neighbour for what is null: right of dimensions that are fixed.

        Raises: ValueError: nothing was asked for, or the sizes do not fit together.
        """
        low, high = self.min or self.opt or self.max, self.max or self.opt or self.min
        if low is None or high is None:
            raise ValueError("no sizes")
        return ShapeRange(min=low, opt=self.opt or low, max=high)

    def completed(self, shape: tuple[int | str, ...], *, usual: ShapeRange) -> ShapeRange:
        """The range to build for: from 1 on where ``shape`` is free, and tuned for the nearest to what is usual.

        Args: usual: the range of whoever asks for none.
        """
        given = self.as_given()
        low = self.min or tuple(
            1 if isinstance(size, str) else least for size, least in zip(shape, given.min, strict=True)
        )
        best = self.opt or tuple(map(_clipped, usual.opt, low, given.max))
        return ShapeRange(min=low, opt=best, max=given.max)


def _clipped(size: int, low: int, high: int) -> int:
    return min(max(size, low), high)


def ranges_from_text(least: str | None, best: str | None, most: str | None) -> dict[str, AskedRange]:
    """Ranges as trtexec takes them, ``name:1x3x224x224,other:1x77`` three times.

    Raises: UsageError: that is no list of sizes, or the three do not fit together.

    Example:
        >>> ranges_from_text(None, None, "x:8x3")["x"].max
        (8, 3)
    """
    given = [_sizes_from_text(text) if text else {} for text in (least, best, most)]
    first: dict[str, tuple[int, ...]] = next((each for each in given if each), {})
    if any(each.keys() != first.keys() for each in given if each):
        raise UsageError("--min-shapes, --opt-shapes and --max-shapes name different inputs.", hint="Name the same.")
    low, middle, high = given
    try:
        return {name: AskedRange(min=low.get(name), opt=middle.get(name), max=high.get(name)) for name in first}
    except ValueError as error:
        raise UsageError(f"These shapes do not fit together: {error}.", hint="Give min ≤ opt ≤ max.") from error


def ranges_to_text(ranges: Mapping[str, AskedRange | ShapeRange]) -> dict[str, str]:
    """What ``ranges_from_text`` was given, by the option's name.

    Example:
        >>> ranges_to_text(ranges_from_text(None, None, "x:8x3"))
        {'max_shapes': 'x:8x3'}
    """
    found = {}
    for part in ("min", "opt", "max"):
        sizes = {name: getattr(each, part) for name, each in ranges.items() if getattr(each, part)}
        if sizes:
            found[f"{part}_shapes"] = ",".join(f"{name}:{'x'.join(map(str, size))}" for name, size in sizes.items())
    return found


def _sizes_from_text(text: str) -> dict[str, tuple[int, ...]]:
    found = {}
    for part in text.split(","):
        name, _, sizes = part.strip().rpartition(":")
        if not name or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
            raise UsageError(f"'{part.strip()}' is no name with sizes.", hint="Such as pixel_values:1x3x224x224.")
        found[name] = tuple(map(int, sizes.split("x")))
    return found


class BuildSettings(Spec, frozen=True, kw_only=True):
    """How an engine is built. What it computes in stands in the graph: networks are strongly typed.

    Args:
        shapes: of every input with free dimensions, by name: one optimization profile.
        workspace_bytes: memory that a layer may use beside its inputs and outputs; 0 is all there is.
        optimization_level: how long TensorRT looks for faster kernels, 0 to 5; 3 is its default.
        compute_capabilities: GPUs to build for, such as ``8.6``, without having one (TensorRT for RTX alone); empty is
            the GPU at hand.
        hardware_compatibility: other GPUs that may run the engine, at some loss of speed.
    """

    backend: EngineBackend
    shapes: dict[str, ShapeRange] = {}
    workspace_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    optimization_level: Annotated[int, msgspec.Meta(ge=0, le=5)] = 3
    compute_capabilities: tuple[Annotated[str, msgspec.Meta(pattern=r"^\d+\.\d$")], ...] = ()
    hardware_compatibility: HardwareCompatibility = "none"


class EngineCard(Spec, frozen=True, kw_only=True):
    """What an engine was built with, from and for; ``<engine>.json`` beside it.

    Args:
        version: of the backend's library; no other opens the engine. trtexec and the Python module need not tell it to
            the same number of digits.
        compute_capabilities: GPUs that it was built for.
        graph_sha256: of the ONNX graph and the weights beside it.
        inputs, outputs: as the graph has them; a free dimension is a name.
    """

    VERSION: ClassVar[int] = 1

    schema_version: int = VERSION
    version: str
    compute_capabilities: tuple[str, ...]
    graph_sha256: str
    settings: BuildSettings
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def key(self) -> str:
        """The same for engines that can stand for each other."""
        parts = (self.version, self.compute_capabilities, self.graph_sha256, self.settings)
        return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()

    def refusal(self, backend: str, version: str, compute_capability: str | None = None) -> str | None:
        """Why the engine does not run by that library on that GPU, as the rest of "The engine was …"; null if it does.

        Args:    compute_capability: null leaves the GPU out.
        """
        if self.settings.backend != backend:
            return f"built for {self.settings.backend}, and this is {backend}"
        if not _is_same_version(self.version, version):
            return f"built by {backend} {self.version}, and this is {version}: engines open in their own version alone"
        if compute_capability is None or compute_capability in self.compute_capabilities:
            return None
        if self.settings.hardware_compatibility == "ampere+" and _as_numbers(compute_capability) >= (8, 0):
            return None
        return (
            f"built for GPUs of compute capability {', '.join(self.compute_capabilities)}, "
            f"and this one has {compute_capability}"
        )


def check_feeds(feeds: Mapping[str, Array], card: EngineCard) -> None:
    """Refuse inputs that the engine was not built for.

    Raises: ModelError: others than it takes, of another type or of a size outside its range.
    """
    taken = {spec.name: spec.dtype for spec in card.inputs}
    given = {name: str(value.dtype) for name, value in feeds.items()}
    if given != taken:
        raise ModelError(
            f"TensorRT could not run the graph: it takes {listed(taken)}, but was given {listed(given)}.",
            hint="Feed what `edgevlm inspect` says that the graph takes.",
        )
    for spec in card.inputs:
        shape, span = feeds[spec.name].shape, card.settings.shapes.get(spec.name)
        is_right = span.holds(shape) if span else shape == spec.shape
        if not is_right:
            wanted = span.describe() if span else "×".join(map(str, spec.shape))
            raise ModelError(
                f"TensorRT could not run the graph: '{spec.name}' is {'×'.join(map(str, shape))}, "
                f"and the engine was built for {wanted}.",
                hint="Build an engine with a wider range of sizes.",
            )


def listed(kinds: Mapping[str, str]) -> str:
    """Tensors with what is said of each, in a sentence."""
    return ", ".join(f"{name} ({kind})" for name, kind in sorted(kinds.items())) or "nothing"


def card_file(engine: Path) -> Path:
    """Where an engine's card lies."""
    return engine.with_name(f"{engine.name}.json")


def write_card(engine: Path, card: EngineCard) -> Path:
    file = card_file(engine)
    file.write_bytes(to_json(card))
    return file


def read_card(engine: Path) -> EngineCard:
    """The card of an engine.

    Raises: BundleError: there is none, or it cannot be read.
    """
    file = card_file(engine)
    try:
        card = from_json(file.read_bytes(), EngineCard)
    except FileNotFoundError as error:
        raise BundleError(
            f"The engine '{engine.name}' has no '{file.name}' beside it that says what it was built for.",
            hint="Build the engine anew from its ONNX graph.",
        ) from error
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BundleError(
            f"The engine's card '{file.name}' cannot be read: {error}.", hint="Build the engine anew from its graph."
        ) from error
    if card.schema_version != EngineCard.VERSION:
        raise BundleError(
            f"The engine's card '{file.name}' is of version {card.schema_version}; this edgevlm reads version "
            f"{EngineCard.VERSION}.",
            hint="Build the engine anew from its graph.",
        )
    return card


def graph_digest(graph: Path) -> str:
    """sha256 of an ONNX graph's file and of the weights beside it, where they lie apart."""
    whole = hashlib.sha256()
    for path in (graph, graph.with_name(f"{graph.name}.data")):
        if path.is_file():
            with path.open("rb") as opened:
                whole.update(bytes.fromhex(sha256_of(opened)))
    return whole.hexdigest()


# --- the command line -------------------------------------------------------------------------------------


def trtexec_command(graph: str, engine: str, settings: BuildSettings, *, major: Literal[10, 11]) -> tuple[str, ...]:
    """What builds ``engine`` from ``graph`` by ``trtexec``, which comes with TensorRT, as arguments.

    Strong typing has to be asked for in 10.x; in 11.x there is no other, and no flag is needed.

    Example:
        >>> trtexec_command("m.onnx", "m.engine", BuildSettings(backend="tensorrt"), major=11)[:3]
        ('trtexec', '--onnx=m.onnx', '--saveEngine=m.engine')
    """
    typed = ("--stronglyTyped",) if major == 10 else ()
    return ("trtexec", f"--onnx={graph}", f"--saveEngine={engine}", *typed, *_trtexec_flags(settings))


def trtexec_line(graph: str, engine: str, settings: BuildSettings, *, major: Literal[10, 11]) -> str:
    """``trtexec_command`` as a line for a shell."""
    return shlex.join(trtexec_command(graph, engine, settings, major=major))


def build_script(graph: str, engine: str, settings: BuildSettings) -> str:
    """A script for a shell that builds the engine with whichever TensorRT a device has."""
    flags = " \\\n  ".join(map(shlex.quote, _trtexec_flags(settings)))
    return _SCRIPT.format(
        graph=shlex.quote(f"--onnx={graph}"), engine=shlex.quote(f"--saveEngine={engine}"), rest=flags
    )


_SCRIPT = """\
#!/bin/sh
# Builds the engine on the device that will run it: an engine opens on the kind of GPU and in the version of TensorRT
# that built it, and nowhere else.
set -eu
cd "$(dirname "$0")"
trtexec=$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)  # where JetPack and the Debian packages put it
if [ ! -x "$trtexec" ]; then
  echo "trtexec is not here: install TensorRT" >&2
  exit 3
fi
# The graph says what each layer computes in. TensorRT 10 must be told to keep to it; 11 does anyway.
typed=
if "$trtexec" --help | grep -q -e --stronglyTyped; then typed=--stronglyTyped; fi
exec "$trtexec" {graph} {engine} $typed \\
  {rest}
"""


def _trtexec_flags(settings: BuildSettings) -> tuple[str, ...]:
    flags = ["--skipInference", "--profilingVerbosity=detailed"]
    flags.append(f"--builderOptimizationLevel={settings.optimization_level}")
    if settings.workspace_bytes:
        flags.append(f"--memPoolSize=workspace:{math.ceil(settings.workspace_bytes / 2**20)}M")
    if settings.hardware_compatibility != "none":
        flags.append(f"--hardwareCompatibilityLevel={_TRTEXEC_COMPATIBILITY[settings.hardware_compatibility]}")
    if settings.shapes:
        for bound in ("min", "opt", "max"):
            flags.append(f"--{bound}Shapes={_trtexec_shapes(settings.shapes, bound)}")
    return tuple(flags)


def _trtexec_shapes(shapes: Mapping[str, ShapeRange], bound: str) -> str:
    return ",".join(f"{quoted_name(name)}:{'x'.join(map(str, getattr(shapes[name], bound)))}" for name in shapes)


def quoted_name(name: str) -> str:
    """An input's name as trtexec takes it: one with a colon in it would end there, and has to stand in quotes."""
    return name if re.fullmatch(r"[\w./]+", name) else f"'{name}'"


def _is_same_version(one: str, other: str) -> bool:
    """As far as both are told: a Jetson's Python module says 10.3.0, and its trtexec 10.3.0 and the build 30."""
    pairs = list(zip(one.split("."), other.split("."), strict=False))
    return len(pairs) >= _N_VERSION and all(left == right for left, right in pairs)


def _as_numbers(compute_capability: str) -> tuple[int, ...]:
    return tuple(map(int, compute_capability.split(".")))
