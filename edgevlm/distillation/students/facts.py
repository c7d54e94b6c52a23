"""How large a student is and how fast it runs, beside its teacher, before any training: graph by graph."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgevlm.distillation.students import Student
from edgevlm.errors import EdgeVLMError
from edgevlm.measure.protocol import ALL_STAY
from edgevlm.measure.spec import Comparison, Protocol, Subject
from edgevlm.model import Graph, Model
from edgevlm.plan import TEXT_ENCODER
from edgevlm.progress import Progress, StepProgress, silent
from edgevlm.runtime.spec import Array, Spec

STUDENT, TEACHER = "student", "teacher"
_TEXTS = ("a photo of a red circle", "a photo of a cat")


class GraphFacts(Spec, frozen=True, kw_only=True):
    """One graph of a model.

    Args:
        n_parameters: of the weights that its outputs depend on.
        n_macs: multiply-accumulates of convolutions and matrix products for one picture, or one text of full length.
    """

    n_parameters: int
    n_macs: int


class StudentFacts(Spec, frozen=True, kw_only=True):
    """A model before it is compiled.

    Args:
        n_parameters: of all weights.
        n_macs: of all ``graphs`` together.
        graphs: by name, those that take a picture or texts and nothing else.
        latency_ms: the median of each graph that could be exported, in float32 at batch 1 on this machine; empty where
            nothing was timed. Weights do not change it, so the student's is known before it is trained.
        reasons: why a latency is missing, or the measurement is not valid; a sentence each.
    """

    name: str
    height: int
    width: int
    n_parameters: int
    n_macs: int
    graphs: dict[str, GraphFacts]
    latency_ms: dict[str, float] = {}
    reasons: tuple[str, ...] = ()


class StudentBesideTeacher(Spec, frozen=True, kw_only=True):
    """Both, and what they were timed by.

    Args:
        comparisons: by graph, ``student`` against ``teacher``, or alone where the teacher could not be exported.
    """

    student: StudentFacts
    teacher: StudentFacts | None
    comparisons: dict[str, Comparison] = {}


def count(module: Any, model: Model) -> StudentFacts:
    """Parameters and multiply-accumulates of ``module``, called as ``model``'s family calls it.

    Source: torch.utils.flop_counter, which counts two operations for each multiply-accumulate.
    """
    graphs = {graph.name: _count_graph(module, model, graph) for graph in _plain_graphs(model)}
    image = model.processing.image
    return StudentFacts(
        name=model.name,
        height=image.height,
        width=image.width,
        n_parameters=sum(parameter.numel() for parameter in module.parameters()),
        n_macs=sum(facts.n_macs for facts in graphs.values()),
        graphs=graphs,
    )


def describe_student(
    student: Student,
    teacher: Model,
    *,
    image_size: int | None = None,
    n_classes: int | None = None,
    protocol: Protocol | None = None,
    progress: Progress = silent,
) -> StudentBesideTeacher:
    """The untrained student beside its teacher: counted, exported to ONNX and timed in turns by the usual protocol.

    A teacher that edgevlm has no module of (an ONNX file) is timed and not counted; one that cannot be exported is
    counted and not timed. Takes about a minute for a graph, see ``Protocol.budget_s``.
    """
    from edgevlm.families.loading import load_module
    from edgevlm.ingest import read_model

    with tempfile.TemporaryDirectory(prefix="edgevlm-") as name:
        folder = Path(name)
        saved = folder / student.name
        student.save(student.build(teacher, image_size=image_size, n_classes=n_classes), saved, teacher)
        untrained = read_model(str(saved), task=teacher.task)
        facts = count(load_module(untrained), untrained)
        teachers = count(load_module(teacher), teacher) if teacher.family else None
        comparisons, reasons = _time_in_turns(
            {STUDENT: untrained, TEACHER: teacher}, folder, protocol or ALL_STAY, progress
        )
    return StudentBesideTeacher(
        student=_timed(facts, STUDENT, comparisons, reasons[STUDENT]),
        teacher=None if teachers is None else _timed(teachers, TEACHER, comparisons, reasons[TEACHER]),
        comparisons=comparisons,
    )


def real_inputs(model: Model, graph: Graph) -> Mapping[str, Array]:
    """Drawn pictures through the model's preprocessing, or texts padded to their full length."""
    from PIL import Image

    from edgevlm.data.shapes import Pictures
    from edgevlm.runtime.image import preprocess
    from edgevlm.runtime.text import load_tokenizer, tokenize

    if graph.name == TEXT_ENCODER:
        text = model.processing.text
        assert text is not None
        return tokenize(_TEXTS, load_tokenizer(Path(model.tokenizer_file), text), text)
    image = model.processing.image
    drawn = [Image.fromarray(picture.image) for picture in Pictures(n=len(_TEXTS), seed=0)]
    return {image.input_name: np.stack([preprocess(picture, image) for picture in drawn])}


def _plain_graphs(model: Model) -> tuple[Graph, ...]:
    """Those for which there is a real input without asking the model; a mask decoder takes what an encoder gives."""
    plain = {model.processing.image.input_name, "input_ids", "attention_mask"}
    return tuple(graph for graph in model.graphs if {spec.name for spec in graph.inputs} <= plain)


def _count_graph(module: Any, model: Model, graph: Graph) -> GraphFacts:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from edgevlm.families import load_family

    inputs = [torch.tensor(value[:1]) for value in real_inputs(model, graph).values()]
    parameters = tuple(module.parameters())
    were_needed = [parameter.requires_grad for parameter in parameters]
    try:
        module.requires_grad_(True)
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            outputs = load_family(model.family).call(module, graph.name, *inputs)
        used = _parameters_behind(outputs)
    finally:
        for parameter, was_needed in zip(parameters, were_needed, strict=True):
            parameter.requires_grad_(was_needed)
    return GraphFacts(
        n_parameters=sum(parameter.numel() for parameter in parameters if id(parameter) in used),
        n_macs=counter.get_total_flops() // 2,
    )


def _parameters_behind(outputs: Sequence[Any]) -> set[int]:
    """The ids of the parameters that the outputs depend on: the leaves of autograd's graph."""
    waiting = [output.grad_fn for output in outputs]
    seen, used = set(), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            used.add(id(node.variable))
        waiting += [child for child, _ in node.next_functions]
    return used


def _time_in_turns(
    models: Mapping[str, Model], folder: Path, protocol: Protocol, progress: Progress
) -> tuple[dict[str, Comparison], dict[str, list[str]]]:
    """Each graph of the student against the teacher's, and why one of them is missing."""
    from edgevlm.measure.interleave import compare

    reasons: dict[str, list[str]] = {who: [] for who in models}
    comparisons: dict[str, Comparison] = {}
    for graph in _plain_graphs(models[STUDENT]):
        subjects = []
        for who, model in models.items():
            # A teacher's only graph is the student's only one, whatever their names.
            graphs = _plain_graphs(model)
            its = next((each for each in graphs if each.name == graph.name or len(graphs) == 1), None)
            try:
                if its is not None:
                    subjects.append(_subject(who, model, its, folder / who, progress))
            except EdgeVLMError as error:
                reasons[who].append(f"The graph '{graph.name}' cannot be exported: {error.message}")
        if not any(subject.name == STUDENT for subject in subjects):
            continue

        def say(text: str, done: int, n: int, name: str = graph.name) -> None:
            progress(StepProgress(name="students", fraction=done / n if n else None, detail=f"{name}: {text}"))

        baseline = TEACHER if len(subjects) > 1 else STUDENT
        comparisons[graph.name] = compare(subjects, baseline=baseline, protocol=protocol, progress=say)
    return comparisons, reasons


def _subject(who: str, model: Model, graph: Graph, folder: Path, progress: Progress) -> Subject:
    from edgevlm.export import export_graph
    from edgevlm.steps.inputs import at_batch, save_inputs

    samples = real_inputs(model, graph)
    made = export_graph(model, graph.name, batch=1, out=folder, samples=samples, progress=progress)
    inputs = save_inputs(folder / f"{graph.name}.npz", at_batch(samples, 1))  # a text at its full length, as counted
    return Subject(name=who, backend="onnxruntime", file=str(folder / made.file), inputs=str(inputs))


def _timed(
    facts: StudentFacts, who: str, comparisons: Mapping[str, Comparison], reasons: Sequence[str]
) -> StudentFacts:
    latency_ms, missing = {}, list(reasons)
    for graph, comparison in comparisons.items():
        measured = comparison.measurement(who) if comparison.has(who) else None
        if measured is None:
            continue
        if measured.failure is not None:
            missing.append(f"The graph '{graph}' could not be timed: {measured.failure}")
            continue
        latency_ms[graph] = measured.percentile_ms(50)
        missing += comparison.reasons
    return msgspec.structs.replace(facts, latency_ms=latency_ms, reasons=tuple(dict.fromkeys(missing)))
