"""What a compile will do, decided before any of it is done: a tuple of steps. No work, no heavy imports, no clock."""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from edgevlm.measure.spec import Protocol
from edgevlm.model import Model
from edgevlm.quantization.calibration import CalibrationRecipe
from edgevlm.runtime.engine import AskedRange
from edgevlm.runtime.spec import Spec
from edgevlm.target import Target

Precision = Literal[
    "auto", "fp32", "fp16", "bf16", "int8", "int8-static", "int8-dynamic", "int8-weights", "int4", "int4-weights"
]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

TEXT_ENCODER = "text_encoder"


class Budgets(Spec, frozen=True, kw_only=True):
    """What the result must keep to.

    Units: ``max_drop`` is a fraction of the metric (0.01 is one point), latency is the p50, a megabyte is 10^6 bytes.
    """

    max_drop: float = 0.01
    max_latency_ms: float | None = None
    max_size_mb: float | None = None


class Request(Spec, frozen=True, kw_only=True):
    """What was asked for, beside the model and the target.

    Args:
        labels: zero-shot labels to fold into the bundle; empty leaves the text tower in.
        batch: pictures in a call; None leaves it free (and is measured at 1).
        n_threads: 0 means the target's cores.
        backends: empty means those of the target that are installed.
        calibration: how activation ranges are found; the whole recipe decides what a search finds.
        protocol: how candidates are timed against each other.
        may_use_fewer_threads: nobody asked for exactly ``n_threads``, so fewer may ship where they are faster.
        search_minutes: for mixed precision and tuning; making and timing every form once is not counted.
        keep_float: patterns of nodes that stay in float.
        ready_made: digests of graphs that compete as they are.
        is_measured: the target is at hand, so that candidates are timed against each other.
        shapes: sizes that an engine is to be built for, by input.
        counted_on: the processor that the target's is emulated as, where instructions are to be counted.
        text_length: tokens that every text has; None leaves texts at their own length, where the tower allows it.
    """

    budgets: Budgets = Budgets()
    precision: Precision = "auto"
    labels: tuple[str, ...] = ()
    batch: int | None = 1
    n_threads: int = 0
    backends: tuple[str, ...] = ()
    calibration: CalibrationRecipe | None = None
    protocol: Protocol = Protocol()
    may_use_fewer_threads: bool = False
    search_minutes: float = 4.0
    keep_float: tuple[str, ...] = ()
    ready_made: dict[str, str] = {}
    is_measured: bool = True
    shapes: dict[str, AskedRange] = {}
    counted_on: str = ""
    text_length: int | None = None


class DataDigests(Spec, frozen=True, kw_only=True):
    """The contents of the three splits, and how many pictures each holds.

    Args: class_names: where they are what the model is asked; of a model with labels of its own they decide nothing.
    """

    source: str
    calibrate: str
    select: str
    report: str
    n_calibrate: int
    n_select: int
    n_report: int
    has_labels: bool
    is_synthetic: bool
    class_names: tuple[str, ...] = ()


class Step(Spec, frozen=True, kw_only=True):
    """One step: an action of the compiler with its parameters, after the steps that it needs.

    Args:
        name: unique in a plan, such as ``export:image_encoder``.
        action: a name in ``edgevlm.compiler.ACTIONS``.
        summary: what it does, for people.
        params: everything that decides its result, beside the results of ``needs``.
    """

    name: str
    action: str
    summary: str
    params: dict[str, Any]
    needs: tuple[str, ...] = ()


def plan(model: Model, target: Target, request: Request, data: DataDigests) -> tuple[Step, ...]:
    """The steps that take ``model`` to a bundle for ``target``."""
    is_folded = bool(request.labels) and any(graph.name == TEXT_ENCODER for graph in model.graphs)
    exports = tuple(_export(model, graph.name, target, request) for graph in model.graphs)
    fold = (_fold(model, request),) if is_folded else ()
    shipped = tuple(graph.name for graph in model.graphs if not (is_folded and graph.name == TEXT_ENCODER))
    make_search = _search if request.is_measured else _offer
    search = make_search(
        model, target, request, data, shipped, needs=(*(f"export:{name}" for name in shipped), *names(fold))
    )
    judged = "the fastest" if request.is_measured else "each of them"
    confirm = Step(
        name="confirm",
        action="confirm",
        summary=f"judge {judged} on {data.n_report} pictures that nothing has seen",
        params={"data": data.report, "max_drop": request.budgets.max_drop, "is_measured": request.is_measured},
        needs=("search", *search.needs),
    )
    explain = Step(
        name="explain",
        action="explain",
        summary="profile the winner and float by operator, against the best rates that this machine reaches",
        params={},
        needs=("confirm", "search", *search.needs),
    )
    bundle = Step(
        name="bundle",
        action="bundle",
        summary="golden vectors, manifest, bill of materials",
        params={
            "name": model.name,
            "target": target.name,
            "licence": model.source.licence,
            "asked": model.source.asked,
            "revision": model.source.revision,
            **({"shapes": msgspec.to_builtins(request.shapes)} if request.shapes else {}),
            **({"compute_capability": target.compute_capability} if target.compute_capability else {}),
        },
        needs=("confirm", "search", *search.needs),
    )
    explained = (explain,) if request.is_measured else ()
    counted = (_count(request.counted_on),) if request.counted_on else ()
    return (*exports, *fold, search, confirm, *explained, bundle, *counted)


def names(steps: tuple[Step, ...]) -> tuple[str, ...]:
    return tuple(step.name for step in steps)


def plan_text(steps: tuple[Step, ...]) -> str:
    """The plan for people: a line for each step."""
    width = max(len(step.name) for step in steps)
    return "\n".join(f"{i}. {step.name:<{width}}  {step.summary}" for i, step in enumerate(steps, 1))


def _export(model: Model, graph: str, target: Target, request: Request) -> Step:
    batch = "free" if _graph_batch(graph, request) is None else str(_graph_batch(graph, request))
    return Step(
        name=f"export:{graph}",
        action="export",
        summary=f"to ONNX (opset {target.opset}, batch {batch}), outputs proven equal to the source's",
        params={
            "model": model.source.digest,
            "family": model.family,
            "graph": graph,
            "opset": target.opset,
            "batch": _graph_batch(graph, request),
            **({"text_length": request.text_length} if request.text_length and graph == TEXT_ENCODER else {}),
        },
    )


def _graph_batch(graph: str, request: Request) -> int | None:
    return None if graph == TEXT_ENCODER else request.batch  # as many texts as there are labels


def _fold(model: Model, request: Request) -> Step:
    template = model.processing.text.prompt_template if model.processing.text else ""
    return Step(
        name="fold",
        action="fold",
        summary=f"embed {len(request.labels)} labels, so that the text tower can stay behind",
        params={"labels": list(request.labels), "prompt_template": template},
        needs=(f"export:{TEXT_ENCODER}",),
    )


def _search(
    model: Model, target: Target, request: Request, data: DataDigests, shipped: tuple[str, ...], needs: tuple[str, ...]
) -> Step:
    only_float = request.precision == "fp32" or target.precisions == ("fp32",)
    what = "the float graph" if only_float else f"float and int8 ({target.activation_sign.upper()} activations)"
    return Step(
        name="search",
        action="search",
        summary=(
            f"{what} on {', '.join(request.backends)}: calibrate on {data.n_calibrate} pictures, time in turns with "
            f"{request.n_threads} thread{'s' * (request.n_threads != 1)}, judge on {data.n_select}"
        ),
        params={
            "graphs": list(shipped),
            "backends": list(request.backends),
            "precision": request.precision,
            "precisions": list(target.precisions),
            "activation_sign": target.activation_sign,
            "n_threads": request.n_threads,
            "may_use_fewer_threads": request.may_use_fewer_threads,
            "search_minutes": request.search_minutes,
            "keep_float": list(request.keep_float),
            "batch": request.batch,
            "budgets": _budgets(request.budgets),
            "calibration": msgspec.to_builtins(request.calibration),
            "protocol": msgspec.to_builtins(request.protocol),
            "calibrate": data.calibrate,
            "select": data.select,
            # Which forms a backend makes depends on the processor they are for.
            "arch": target.arch,
            "isa": list(target.isa),
            **({"class_names": list(data.class_names)} if data.class_names else {}),
            **({"ready_made": request.ready_made} if request.ready_made else {}),
        },
        needs=needs,
    )


def _offer(
    model: Model, target: Target, request: Request, data: DataDigests, shipped: tuple[str, ...], needs: tuple[str, ...]
) -> Step:
    """In the place of the search, where the target is not at hand."""
    step = _search(model, target, request, data, shipped, needs)
    timing = ("protocol", "search_minutes", "may_use_fewer_threads")
    return msgspec.structs.replace(
        step,
        action="offer",
        summary=(
            f"forms for {', '.join(request.backends)} that {target.name} can choose from: calibrate on "
            f"{data.n_calibrate} pictures, judge on {data.n_select}, time nothing"
        ),
        params={
            **{name: value for name, value in step.params.items() if name not in timing},
            "may_use_fewer_threads": False,
            "runtimes": target.runtimes,
            "onnx_ir": target.onnx_ir,
            "target": target.name,
        },
    )


def _count(cpu: str) -> Step:
    return Step(
        name="count",
        action="count",
        summary=f"instructions of a run of each form on an emulated {cpu}",
        params={"cpu": cpu},
        needs=("bundle",),
    )


def _budgets(budgets: Budgets) -> dict[str, float]:
    asked = {name: getattr(budgets, name) for name in budgets.__struct_fields__}
    return {name: value for name, value in asked.items() if value is not None}
