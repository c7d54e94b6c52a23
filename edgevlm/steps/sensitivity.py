"""What each group of a graph's nodes costs in accuracy and saves in time when it alone is lowered."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from edgevlm.errors import EdgeVLMError
from edgevlm.evaluation.evaluation import Drop
from edgevlm.job import Work
from edgevlm.measure.protocol import screening
from edgevlm.progress import StepProgress
from edgevlm.report.spec import GroupSensitivity
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.session import run_rows
from edgevlm.runtime.spec import Array, Spec
from edgevlm.search.spec import Variant
from edgevlm.steps.inputs import graph_inputs, processing_of
from edgevlm.steps.timing import time_variants
from edgevlm.steps.variants import Form, GraphForms, file_digest
from edgevlm.store import code_digest, read_spec, write_spec

# Every group is one more form to make, time and judge; what a dozen groups tell more than eight is little.
N_GROUPS = 8
# The power of quantization noise settles after some tens of pictures (it is a mean over all values of an output).
N_PICTURES = 32
# Where nothing changes at all, or the outputs are constants: more than float32 can tell apart.
MAX_SQNR_DB = 150.0


@dataclass(frozen=True, kw_only=True)
class NodeGroup:
    """Nodes that are lowered or kept in float together."""

    name: str
    nodes: tuple[str, ...]


def node_groups(nodes: Sequence[str], n_groups: int = N_GROUPS) -> tuple[NodeGroup, ...]:
    """Stretches of about equal length; the first and the last node stand alone, where there are enough.

    The layers that read pixels and that write answers are the usual culprits (arXiv:1712.05877, section 3).

    Example:
        >>> [group.nodes for group in node_groups(["a", "b", "c", "d", "e"], 4)]
        [('a',), ('b', 'c'), ('d',), ('e',)]
    """
    if len(nodes) <= n_groups:
        stretches = [(node,) for node in nodes]
    else:
        middle = np.array_split(np.arange(1, len(nodes) - 1), n_groups - 2)
        indices = [[0], *(list(part) for part in middle), [len(nodes) - 1]]
        stretches = [tuple(nodes[i] for i in part) for part in indices]
    return tuple(NodeGroup(name=_name(stretch), nodes=stretch) for stretch in stretches)


def _name(nodes: tuple[str, ...]) -> str:
    return nodes[0] if len(nodes) == 1 else f"{nodes[0]} … {nodes[-1]}"


def keeping(form: Form, kept: Sequence[NodeGroup]) -> Form:
    """The form with these groups in float, beside what it keeps already."""
    return keeping_nodes(form, [name for group in kept for name in group.nodes])


def keeping_nodes(form: Form, nodes: Sequence[str]) -> Form:
    names = (*form.recipe.keep_float, *nodes)
    recipe = msgspec.structs.replace(form.recipe, keep_float=tuple(dict.fromkeys(names)))
    return Form(backend=form.backend, recipe=recipe)


def find_sensitivities(
    work: Work,
    forms: GraphForms,
    form: Form,
    baseline: Variant,
    groups: tuple[NodeGroup, ...],
    drop_of: Callable[[Variant], Drop | None],
    *,
    is_over: Callable[[], bool],
) -> tuple[GroupSensitivity, ...]:
    """One form for each group, which alone it lowers; made, timed in turns, and compared with float's outputs.

    Args:
        drop_of: judges a variant, or says None where that takes too long.
        is_over: there is no more time; nothing is found then.
    """
    variants: list[Variant] = []
    for i, group in enumerate(groups, start=1):
        if is_over():
            return ()
        others = [other for other in groups if other is not group]
        variants.append(forms.make(keeping(form, others), suffix=f"~only-{i}"))
    protocol = screening(msgspec.structs.replace(work.job.request.protocol, halve_at=()))
    comparison = time_variants(
        work, forms.graph, [baseline, *variants], protocol=protocol, extend=False, what="groups alone, "
    )
    found = []
    float_run = functools.cache(lambda: _run_of(work, baseline))  # the same for all
    for variant, group in zip(variants, groups, strict=True):
        ratio = None if variant.failure or is_over() else comparison.ratio(variant.name)
        if ratio is None:
            continue
        try:
            sqnr_db, drop = output_sqnr_db(work, variant, baseline, float_run), drop_of(variant)
        except EdgeVLMError:
            continue  # a group whose form does not run is one that stays where it is
        found.append(
            GroupSensitivity(
                graph=forms.graph,
                form=form.recipe.name,
                group=group.name,
                nodes=group.nodes,
                sqnr_db=sqnr_db,
                drop=None if drop is None else drop.value,
                saved_ms=(1 - ratio.value) * comparison.measurement(baseline.name).percentile_ms(50),
                ratio=ratio.value,
                ratio_low=ratio.low,
                ratio_high=ratio.high,
            )
        )
    return tuple(found)


class Sqnr(Spec, frozen=True, kw_only=True):
    sqnr_db: float


@dataclass(frozen=True)
class _Run:
    """What a graph was fed, and what it answered."""

    inputs: dict[str, Array]
    outputs: list[Array]


def _run_of(work: Work, variant: Variant) -> _Run:
    text = processing_of(work).text
    inputs = graph_inputs(work.job, variant.graph, work.job.splits.select, N_PICTURES, text=text)
    return _Run(inputs, _outputs(work, variant, inputs))


def _outputs(work: Work, variant: Variant, inputs: dict[str, Array]) -> list[Array]:
    session = load_backend(variant.backend).open(work.out / variant.file, variant.session)
    return list(run_rows(session, inputs).values())


def output_sqnr_db(work: Work, variant: Variant, baseline: Variant, float_run: Callable[[], _Run]) -> float:
    """Signal to quantization noise of a form's outputs over some pictures of the select split, in decibel.

    Args: float_run: the baseline's.
    """
    parts = {
        "variant": file_digest(work.out / variant.file),
        "session": msgspec.to_builtins(variant.session),
        "baseline": file_digest(work.out / baseline.file),
        "select": work.step.params["select"],
        "processing": msgspec.to_builtins(processing_of(work)),
        "code": code_digest(),
    }

    def make(out: Path) -> None:
        work.progress(StepProgress(name=work.step.name, detail=f"{variant.graph}: noise of {variant.name}"))
        expected = float_run()
        noise = sqnr_db(expected.outputs, _outputs(work, variant, expected.inputs))
        write_spec(out / "sqnr.json", Sqnr(sqnr_db=noise))

    return read_spec(work.store.fetch("sqnr", parts, make).path / "sqnr.json", Sqnr).sqnr_db


def sqnr_db(expected: Sequence[Array], actual: Sequence[Array]) -> float:
    """10 log10 of signal power over noise power, each output's at its own scale; the mean over the outputs.

    Shapes:  the arrays of both, one by one, are of equal shape.
    Example:
        >>> round(sqnr_db([np.array([1.0, -1.0])], [np.array([1.1, -1.1])]), 2)
        20.0
    """
    shares = []
    for right, given in zip(expected, actual, strict=True):
        signal = right.astype(np.float64)
        noise = float(np.square(given.astype(np.float64) - signal).sum())
        shares.append(noise / max(float(np.square(signal).sum()), 1e-30))
    share = float(np.mean(shares))
    if not np.isfinite(share):
        return -MAX_SQNR_DB
    return float(np.clip(-10 * np.log10(max(share, 1e-30)), -MAX_SQNR_DB, MAX_SQNR_DB))
