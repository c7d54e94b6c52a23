"""The same graph twice: whatever its ratio to itself shows besides 1 is the error of measuring.

    python -m benchmarks.aa_measurement

A small convolutional network is measured against a copy of itself with a short protocol, again and again, at one
thread and at two. Every ratio with its interval and verdict, and the medians of all turns, go to
`results/aa_measurement.json`; the shares are printed and stand in docs/measuring.md. Takes about six minutes on two
cores.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
import numpy as np

from edgevlm.cli.tables import table_text
from edgevlm.measure.environment import describe_environment
from edgevlm.measure.interleave import compare
from edgevlm.measure.spec import Comparison, Environment, Protocol, Subject
from edgevlm.measure.statistics import turn_medians
from edgevlm.runtime.spec import SessionOptions, Spec, to_json

RESULT = Path(__file__).parent / "results" / "aa_measurement.json"
ONE, TWIN = "one", "twin"

# Four sittings, as the default protocol takes at most, but shorter ones.
PROTOCOL = Protocol(
    n_rounds=24, rounds_per_sitting=6, min_rounds=24, stop_half_width=0.0, block_ms=15.0, warmup_ms=50.0, halve_at=()
)


class Repeat(Spec, frozen=True, kw_only=True):
    """One measurement of the twin against the one.

    Units: ``one_ms`` and ``twin_ms`` are medians of the turns, less what runs waited for others, to the microsecond.
    """

    n_threads: int
    ratio: float
    low: float
    high: float
    reasons: tuple[str, ...]
    other_load: float | None
    wall_s: float
    one_ms: tuple[float, ...]
    twin_ms: tuple[float, ...]

    @property
    def holds_1(self) -> bool:
        return self.low <= 1 <= self.high

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2 / self.ratio


class Result(Spec, frozen=True, kw_only=True):
    schema_version: int
    command: str
    made_at: str
    environment: Environment
    protocol: Protocol
    repeats: tuple[Repeat, ...]


@click.command()
@click.option("--repeats", default=40, show_default=True, help="Measurements at each number of threads.")
@click.option("--threads", "n_threads", multiple=True, default=(1, 2), show_default=True, type=int)
def main(repeats: int, n_threads: tuple[int, ...]) -> None:
    """Measure a graph against a copy of itself."""
    done: list[Repeat] = []
    with tempfile.TemporaryDirectory() as folder:
        write_network(Path(folder))
        for i in range(repeats):
            for n in n_threads:  # in turn, so that a change of the machine's load meets both
                done.append(measure(Path(folder), n_threads=n, seed=i))
            click.echo(f"{i + 1} of {repeats} repeats", err=True)
    result = Result(
        schema_version=1,
        command="python -m benchmarks.aa_measurement",
        made_at=time.strftime("%Y-%m-%d", time.gmtime()),
        environment=describe_environment(),
        protocol=PROTOCOL,
        repeats=tuple(done),
    )
    RESULT.write_bytes(to_json(result))
    click.echo(table(result.repeats))


def write_network(folder: Path) -> None:
    """Eight 3 × 3 convolutions over 32 channels of 56 × 56, some 3 ms on one core, and a copy beside it."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for i in range(8):
        n_in = 32 if i else 3
        weight = rng.normal(0, (2 / (9 * n_in)) ** 0.5, (32, n_in, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{i}"))
        nodes.append(helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"y{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"y{i}"], [f"x{i + 1}"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, n_channels, 56, 56])
        for name, n_channels in (("x0", 3), ("x8", 32))
    ]
    graph = helper.make_graph(nodes, "network", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / f"{ONE}.onnx")
    shutil.copyfile(folder / f"{ONE}.onnx", folder / f"{TWIN}.onnx")
    np.savez(folder / "inputs.npz", allow_pickle=False, x0=rng.normal(size=(1, 3, 56, 56)).astype(np.float32))


def measure(folder: Path, *, n_threads: int, seed: int) -> Repeat:
    subjects = [
        Subject(
            name=name,
            backend="onnxruntime",
            file=str(folder / f"{name}.onnx"),
            inputs=str(folder / "inputs.npz"),
            session=SessionOptions(n_threads=n_threads),
        )
        for name in (ONE, TWIN)
    ]
    found = compare(subjects, baseline=ONE, protocol=msgspec.structs.replace(PROTOCOL, seed=seed))
    ratio = found.ratio(TWIN)
    assert ratio is not None, found.reasons
    return Repeat(
        n_threads=n_threads,
        ratio=ratio.value,
        low=ratio.low,
        high=ratio.high,
        reasons=found.reasons,
        other_load=found.other_load,
        wall_s=found.wall_s,
        one_ms=_medians(found, ONE),
        twin_ms=_medians(found, TWIN),
    )


def _medians(found: Comparison, name: str) -> tuple[float, ...]:
    return tuple(round(ms, 3) for ms in turn_medians(found.measurement(name)).values())


def table(repeats: Sequence[Repeat]) -> str:
    """What docs/measuring.md quotes, by number of threads."""
    rows = []
    for n_threads in sorted({each.n_threads for each in repeats}):
        some = [each for each in repeats if each.n_threads == n_threads]
        logs = np.log([each.ratio for each in some])
        loads = [each.other_load for each in some if each.other_load is not None]
        load = f"{np.median(loads):.0%} ({min(loads):.0%} to {max(loads):.0%})" if loads else "not known"
        rows.append((
            str(n_threads),
            str(len(some)),
            load,
            str(sum(each.holds_1 for each in some)),
            f"{np.exp(logs.mean()):.3f}",
            f"{logs.std():.1%}",
            f"±{np.median([each.half_width for each in some]):.1%}",
            str(sum(not each.reasons for each in some)),
            f"{np.median([each.wall_s for each in some]):.1f} s",
        ))  # fmt: skip
    header = ("threads", "repeats", "others' load", "hold 1", "mean", "deviation", "interval", "valid", "each took")
    return table_text(header, rows, right=range(len(header)))


if __name__ == "__main__":
    main()
