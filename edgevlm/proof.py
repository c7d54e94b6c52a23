"""Two sessions give the same outputs, or the first node where they part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from edgevlm.errors import ModelError
from edgevlm.report.spec import Proof
from edgevlm.runtime.backends import Session, load_backend
from edgevlm.runtime.session import run_rows
from edgevlm.runtime.spec import Array, SessionOptions, Spec

# Between PyTorch and ONNX Runtime in float32 the 48 architectures of our export matrix, small and of random weights,
# differ by at most 2.7e-5 of the largest output, and the trained MobileNetV2 by 1.1e-6; one weight that is 1 % off
# gives 3e-3 (tests/test_export.py). In between lies room for deeper models.
TOLERANCE = 1e-4


class Difference(Spec, frozen=True, kw_only=True):
    """A node whose output is the first to differ. ``error`` is relative, as in ``relative_error``."""

    node: str
    operator: str
    error: float


def relative_error(got: Array, expected: Array) -> float:
    """max |got - expected| over max |expected|; infinite where the shapes differ or a value is not a number.

    Example:
        >>> relative_error(np.array([1.0, 2.1]), np.array([1.0, 2.0]))
        0.05
    """
    if got.shape != expected.shape or not np.isfinite(got).all():
        return float("inf")
    if expected.size == 0:
        return 0.0
    largest = float(np.abs(expected, dtype=np.float64).max())
    difference = float(np.abs(got.astype(np.float64) - expected.astype(np.float64)).max())
    return round(difference / largest, 12) if largest > 0 else difference


def prove_equal(
    session: Session,
    reference: Session,
    *,
    samples: Mapping[str, Array],
    batches: Iterable[int],
    tolerance: float,
    component: str,
    route: str,
    n_nodes: int,
    locate: Callable[[Mapping[str, Array]], Difference | None],
) -> Proof:
    """Run both on the samples at every batch size and compare.

    Args:
        samples: real inputs by name, along the first axis.
        batches: sizes of the calls of ``session``; the reference is called once with all samples.
        locate: called with the offending inputs, to name the node where they part.
    Raises: ModelError: the outputs differ beyond ``tolerance``, or hold NaN.
    """
    n_samples = len(next(iter(samples.values())))
    expected = reference.run(samples)
    for name, value in expected.items():
        if not np.isfinite(value).all():
            raise ModelError(
                f"The source of '{component}' gives NaN or infinite values in '{name}' for a real input.",
                hint="Check that the weights are whole and the preprocessing is the model's own.",
            )
    worst = 0.0
    batches = tuple(batches)
    for batch in batches:
        for start in range(0, n_samples, batch):
            index = np.arange(start, start + batch) % n_samples  # the last call is filled up from the front
            feeds = {name: value[index] for name, value in samples.items()}
            for name, got in session.run(feeds).items():
                error = relative_error(got, expected[name][index])
                if error > tolerance:
                    raise _apart(component, name, error, tolerance, batch, locate(feeds))
                worst = max(worst, error)
    return Proof(
        component=component,
        route=route,
        n_inputs=n_samples,
        batches=batches,
        max_relative_error=worst,
        tolerance=tolerance,
        n_nodes=n_nodes,
    )


def prove_lengths(
    session: Session, reference: Session, *, texts: Mapping[str, Array], lengths: Sequence[int], tolerance: float
) -> float:
    """Whether texts give at their own length what they give padded: each alone, and beside longer ones.

    Args:
        texts: inputs by name, padded at their end to the full length, along the first axis.
        lengths: of each text without its padding.
    Returns: the largest relative error between the two, in ``session``; 0 where they are equal to the bit.
    Raises: ModelError: they differ from each other or from the reference's padded ones by more than ``tolerance``.
    """
    padded, expected = run_rows(session, texts), reference.run(texts)
    calls = [*([i] for i in range(len(lengths))), *(list(range(i, len(lengths), 3)) for i in range(3))]
    worst = 0.0
    for rows in calls:
        length = max((lengths[i] for i in rows), default=0)
        if not length:
            continue
        for name, got in run_rows(session, {name: value[rows, :length] for name, value in texts.items()}).items():
            error = relative_error(got, padded[name][rows])
            worst = max(worst, error)
            if max(error, relative_error(got, expected[name][rows])) > tolerance:
                raise ModelError(
                    f"Unpadded, a text of {length} tokens gives another '{name}' than padded to the full length: it "
                    f"differs by {error:.1e} of the largest value, where {tolerance:.0e} is allowed."
                )
    return worst


def first_difference(
    graph: Path, feeds: Mapping[str, Array], reference: Mapping[str, Array], *, tolerance: float
) -> Difference | None:
    """The first node, in the graph's order, whose output differs from the reference's value of the same name.

    Args:
        reference: values by the names that they have in the graph; those that only one side has are passed over.
    Returns: None where all values of the same name agree.
    """
    import onnx

    proto = onnx.load(graph, load_external_data=False)
    known = {name for node in proto.graph.node for name in node.output if name in reference}
    outputs = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in sorted(known - outputs))
    probe = graph.with_name(f"{graph.stem}.probe.onnx")  # beside the graph, where its external data lies
    try:
        onnx.save(proto, probe)
        values = load_backend("onnxruntime").open(probe, SessionOptions(graph_level="none")).run(feeds)
    finally:
        probe.unlink(missing_ok=True)
    for node in proto.graph.node:
        for name in node.output:
            if name in known:
                error = relative_error(values[name], np.asarray(reference[name]))
                if error > tolerance:
                    return Difference(node=node.name or name, operator=node.op_type, error=error)
    return None


def _apart(
    component: str, output: str, error: float, tolerance: float, batch: int, where: Difference | None
) -> ModelError:
    place = (
        f"; they part at the node '{where.node}' ({where.operator}), by {where.error:.1e}"
        if where is not None
        else "; no single node could be named"
    )
    return ModelError(
        f"The graph '{component}' is not equal to its source: at batch {batch} '{output}' differs by {error:.1e} of "
        f"the largest value, where {tolerance:.0e} is allowed{place}.",
        hint="Report the model and this message; meanwhile try another --batch or another version of PyTorch.",
    )
