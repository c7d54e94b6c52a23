"""What the suite keeps. Rivals' environments import this too, so it needs no more than msgspec and numpy."""

from __future__ import annotations

from typing import Literal

from edgevlm.measure.spec import Comparison
from edgevlm.runtime.spec import SessionOptions, Spec


class Rival(Spec, frozen=True, kw_only=True):
    """Something else that a user could run.

    Args:
        environment: a name in ``environments/``.
        maker: ``package.module:function`` that writes its artifact; empty where it runs the model as it is.
        takes: what it starts from: the float ONNX graph, a Transformers checkpoint, or the model in PyTorch (where a
            model came as ONNX alone, its operators as torch calls).
        backend: as ``edgevlm.measure.spec.Subject`` has it.
        settings: for the maker.
        entries: session settings, by the backend's names.
    """

    name: str
    environment: str
    backend: str
    maker: str = ""
    takes: Literal["graph", "checkpoint", "module"] = "graph"
    settings: dict[str, str] = {}
    entries: dict[str, str] = {}


class MakeRequest(Spec, frozen=True, kw_only=True):
    """What a maker gets.

    Args:
        source: the float graph, or the folder of the checkpoint.
        architecture: the Transformers class of the checkpoint.
        calibration: an ``.npz`` with one array [n, ...] per input: the pictures that edgevlm calibrates on.
        outputs: of the float graph, by name.
        is_transformer: it holds attention; some tools' documentation asks for a setting then.
        out: an empty folder.
    """

    maker: str
    source: str
    architecture: str = ""
    calibration: str
    outputs: tuple[str, ...]
    is_transformer: bool
    settings: dict[str, str]
    out: str


class Made(Spec, frozen=True, kw_only=True):
    """What a maker wrote.

    Args:
        file: relative to the folder.
        says: what the tool did, by a name and in words.
        failure: why there is no artifact, in the tool's words.
    """

    file: str = ""
    says: dict[str, str] = {}
    failure: str | None = None


class Judged(Spec, frozen=True, kw_only=True):
    """How far the answers fall behind those of the float graph.

    Units: fractions; ``drop`` is ``reference`` - ``value``.
    Args:
        lowest: the smallest score of a picture, where the scores are cosines.
        says: what really runs, in the backend's words.
        others: further metrics by name, among them how far the answers are the float graph's.
    """

    metric: str
    value: float
    reference: float
    drop: float
    low: float
    high: float
    n: int
    lowest: float | None = None
    is_within: bool
    says: dict[str, str] = {}
    others: dict[str, float] = {}


class Contender(Spec, frozen=True, kw_only=True):
    """A rival, or edgevlm's winner, as it was made and judged.

    Args:
        failure: why it did not run, in the tool's words.
    """

    name: str
    environment: str
    n_bytes: int | None = None
    says: dict[str, str] = {}
    judged: Judged | None = None
    failure: str | None = None


class ThreadsResult(Spec, frozen=True, kw_only=True):
    """One model at one thread count.

    Args:
        ours: what edgevlm ships.
        winner: the name of that candidate; ``backend`` runs it with ``session``.
        screening: everybody in turns, shortly.
        final: edgevlm's winner against those that come near, and float, and PyTorch; ratios are theirs ÷ edgevlm's,
            so above 1 edgevlm is faster.
        best: the fastest within the budget, by ``final``; null where no rival is.
    """

    n_threads: int
    ours: Contender
    winner: str
    backend: str
    session: SessionOptions
    screening: Comparison
    final: Comparison
    best: str | None


class CaseResult(Spec, frozen=True, kw_only=True):
    schema_version: int
    key: str
    name: str
    is_random: bool
    made_at: str
    n_calibrate: int
    rivals: tuple[Contender, ...]
    threads: tuple[ThreadsResult, ...]
