"""The forms of a graph that are worth trying, each made through the store when it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from edgevlm.errors import EdgeVLMError, MissingToolError, ModelError, StoreError, UsageError, did_you_mean
from edgevlm.export import Exported
from edgevlm.extras import tool_versions
from edgevlm.job import Job, Work, place
from edgevlm.lowering import Lowered, Recipe, load_lowering
from edgevlm.plan import TEXT_ENCODER
from edgevlm.progress import Event, Progress, StepProgress
from edgevlm.quantization.calibration import CalibrationRecipe, collect_ranges
from edgevlm.quantization.schemes import Calibration
from edgevlm.runtime.spec import Array, SessionOptions
from edgevlm.search.choose import FLOAT
from edgevlm.search.spec import Variant
from edgevlm.steps.inputs import at_batch, graph_inputs, processing_of, prompts, text_inputs
from edgevlm.store import code_digest, read_spec, write_spec

# What preprocesses the calibration data, beside what makes the forms themselves.
_TOOLS = ("numpy", "pillow", "tokenizers")


def is_text_judged(job: Job) -> bool:
    """Whether the metric asks about texts at all: without any labels it sees the picture's vector alone."""
    return bool(job.request.labels) or job.data.has_labels


@dataclass(frozen=True, kw_only=True)
class Form:
    """A recipe of a backend."""

    backend: str
    recipe: Recipe


class GraphForms:
    """The forms of one graph. What they are made of is looked up or made when it is first needed.

    The first backend's float form is the baseline, and is called ``fp32`` whatever the backend.
    """

    def __init__(self, work: Work, graph: str) -> None:
        self.graph = graph
        self._work = work
        self._calibration = GraphCalibration(work, graph)
        self._lowerings = {name: load_lowering(name) for name in work.step.params["backends"]}
        folder = work.inputs[f"export:{graph}"]
        self._source = folder / read_spec(folder / "exported.json", Exported).file

    @cached_property
    def baseline(self) -> Form:
        """Every other form is compared with this one.

        Raises: EdgeVLMError: the first backend does not take the graph.
        """
        backend = next(iter(self._lowerings))
        recipe = self._recipes(backend)[0]
        return Form(backend=backend, recipe=msgspec.structs.replace(recipe, name=FLOAT))

    def forms(self) -> tuple[Form | Variant, ...]:
        """What to try, the baseline first; a variant with a failure where a backend does not take the graph."""
        found: list[Form | Variant] = [self.baseline]
        for backend in self._lowerings:
            try:
                recipes = self._recipes(backend)
            except (MissingToolError, StoreError):
                raise
            except EdgeVLMError as error:
                found.append(self._failed(f"{backend}-{FLOAT}", FLOAT, backend, error))
                continue
            is_first = backend == self.baseline.backend
            found += [Form(backend=backend, recipe=r) for r in recipes[is_first:] if self._is_wanted(r)]
        return (*found, *self._ready_made())

    def make(self, form: Form, *, suffix: str = "") -> Variant:
        """The form on disk, below ``work.out``; one that its quantizer refuses is a variant with a failure.

        Args: suffix: sets forms of one recipe apart, in their names.
        """
        recipe = form.recipe
        name = recipe.name + suffix
        self._work.progress(StepProgress(name=self._work.step.name, detail=f"{self.graph}: making {name}"))
        try:
            folder = self._lowered(form)
        except (MissingToolError, StoreError):
            raise
        except EdgeVLMError as error:
            return self._failed(name, recipe.precision, form.backend, error)
        lowered = read_spec(folder / "lowered.json", Lowered)
        files = tuple(f"graphs/{self.graph}/{name}/{file}" for file in lowered.files)
        for path, file in zip(files, lowered.files, strict=True):
            place(folder / file, self._work.out / path)
        return Variant(
            graph=self.graph,
            name=name,
            precision=recipe.precision,
            backend=form.backend,
            file=files[0],
            files=files,
            n_bytes=sum((folder / file).stat().st_size for file in lowered.files),
            session=msgspec.structs.replace(recipe.session, n_threads=self._work.step.params["n_threads"]),
            recipe={**recipe.describe(), **lowered.runs},
        )

    def sessions(self, form: Form) -> Mapping[str, SessionOptions]:
        """Other ways to open a form."""
        params = self._work.step.params
        return self._lowerings[form.backend].sessions(
            form.recipe, n_threads=params["n_threads"], may_use_fewer=params["may_use_fewer_threads"]
        )

    def lowered_nodes(self, form: Form) -> tuple[str, ...]:
        """The nodes that do the work and that the form lowers, in the order in which they run."""
        return self._lowerings[form.backend].lowered_nodes(self._prepared(form.backend), form.recipe)

    def _ready_made(self) -> tuple[Form, ...]:
        file = self._work.job.ready_made.get(self.graph)
        if file is None:
            return ()
        from edgevlm.lowering.onnxruntime import ready_made_recipe

        return (Form(backend="onnxruntime", recipe=ready_made_recipe(file, file_digest(file))),)

    # --- making -------------------------------------------------------------------------------------------

    def _is_wanted(self, recipe: Recipe) -> bool:
        wanted, precisions = self._work.step.params["precision"], self._work.step.params["precisions"]
        is_right = wanted == "auto" or recipe.precision == wanted or recipe.precision.startswith(f"{wanted}-")
        if recipe.precision.split("-")[0] not in precisions:
            return False
        if recipe.is_for_size and wanted in ("auto", "int8"):  # the other words ask for small weights
            is_right &= self._work.job.request.budgets.max_size_mb is not None
        is_judged = self.graph != TEXT_ENCODER or is_text_judged(self._work.job)
        return is_right and (is_judged or recipe.precision == FLOAT)

    def _recipes(self, backend: str) -> tuple[Recipe, ...]:
        work = self._work
        recipes: tuple[Recipe, ...] = self._lowerings[backend].recipes(
            self._prepared(backend), target=work.job.target, calibration=work.job.recipe
        )
        patterns = work.step.params["keep_float"]
        return tuple(self._keeping(backend, recipe, patterns) for recipe in recipes) if patterns else recipes

    def _keeping(self, backend: str, recipe: Recipe, patterns: Sequence[str]) -> Recipe:
        nodes = self.lowered_nodes(Form(backend=backend, recipe=recipe))
        kept = tuple(node for node in nodes if any(fnmatchcase(node, pattern) for pattern in patterns))
        return msgspec.structs.replace(recipe, keep_float=kept) if kept else recipe

    def _prepared(self, backend: str) -> Path:
        lowering = self._lowerings[backend]

        def make(out: Path) -> None:
            (out / "prepared.txt").write_text(lowering.prepare(self._source, out).name)

        parts = {**_parts(self._source, lowering.tools), "backend": backend, "name": self.graph}
        folder = self._work.store.fetch("prepare", parts, make).path
        return folder / (folder / "prepared.txt").read_text()

    def _lowered(self, form: Form) -> Path:
        lowering, prepared = self._lowerings[form.backend], self._prepared(form.backend)
        # Neither what it is called nor how it is opened changes what is made.
        recipe = msgspec.structs.replace(form.recipe, name="", precision="", session=SessionOptions())
        parts = {
            **_parts(prepared, lowering.tools),
            "source": file_digest(self._source),
            "backend": form.backend,
            "recipe": msgspec.to_builtins(recipe),
            "calibration": self._calibration.key if recipe.is_calibrated else None,
        }

        def make(out: Path) -> None:
            lowered = lowering.lower(self._source, prepared, form.recipe, self._calibration, out)
            write_spec(out / "lowered.json", lowered)

        return self._work.store.fetch("lower", parts, make).path

    def _failed(self, name: str, precision: str, backend: str, error: EdgeVLMError) -> Variant:
        return Variant(graph=self.graph, name=name, precision=precision, backend=backend, failure=error.message)


def made_baseline(forms: GraphForms) -> Variant:
    """Raises: ModelError: the first backend does not take the graph."""
    variant = forms.make(forms.baseline)
    if variant.failure is not None:
        raise ModelError(variant.failure, hint="Check that the first of --backends runs the float graph.")
    return variant


def check_keep_float(work: Work, graphs: Sequence[GraphForms]) -> None:
    """Every pattern of ``--keep-float`` must match a node that some form would lower.

    Raises: UsageError: one matches nothing.
    """
    patterns: list[str] = work.step.params["keep_float"]
    if not patterns:
        return
    forms = [(each, form) for each in graphs for form in each.forms() if isinstance(form, Form)]
    nodes = {node for each, form in forms for node in each.lowered_nodes(form)}
    for pattern in patterns:
        if not any(fnmatchcase(node, pattern) for node in nodes):
            examples = ", ".join(sorted(nodes)[:3])
            raise UsageError(
                f"--keep-float '{pattern}' matches none of the {len(nodes)} nodes that could be lowered.",
                hint=did_you_mean(pattern, nodes) if nodes and "*" not in pattern else f"They are called {examples}, …",
            )


class GraphCalibration:
    """The calibration split as one graph takes it."""

    def __init__(self, work: Work, graph: str) -> None:
        self._work = work
        self._graph = graph

    @property
    def recipe(self) -> CalibrationRecipe:
        return self._work.job.recipe

    @property
    def key(self) -> Mapping[str, Any]:
        """Everything that decides what ``feeds`` gives."""
        return {
            "calibrate": self._work.step.params["calibrate"],
            "n_samples": self.recipe.n_samples,
            "processing": msgspec.to_builtins(processing_of(self._work)),
            "labels": list(self._work.job.request.labels or self._work.job.splits.calibrate.class_names),
            "batch": self._work.step.params["batch"],
        }

    def feeds(self) -> Iterator[dict[str, Array]]:
        job = self._work.job
        if self._graph == TEXT_ENCODER:  # one by one, each at the length at which the device will run it
            for text in prompts(job, job.splits.calibrate)[: self.recipe.n_samples]:
                yield text_inputs(job, [text], processing_of(self._work).text)
            return
        batch = self._work.step.params["batch"] or 1
        samples = job.splits.calibrate.samples[: self.recipe.n_samples]
        for start in range(0, len(samples), batch):  # some at a time: a hundred pictures of SAM's size take a gigabyte
            these = job.splits.calibrate.only(samples[start : start + batch])
            yield at_batch(graph_inputs(job, self._graph, these, batch), batch)

    def ranges(self, prepared: Path, method: Calibration) -> Path:
        parts = {**_parts(prepared, ("onnx", "onnxruntime")), "method": method, **self.key}

        def make(out: Path) -> None:
            collect_ranges(prepared, self.feeds(), method, out / "ranges.json", _renamed(self._work))

        return self._work.store.fetch("ranges", parts, make).path / "ranges.json"


def _parts(graph: Path, tools: tuple[str, ...]) -> dict[str, Any]:
    return {"graph": file_digest(graph), "tools": tool_versions(*tools, *_TOOLS), "code": code_digest()}


def _renamed(work: Work) -> Progress:
    """Progress of a part of this step, told in the step's name."""

    def say(event: Event) -> None:
        if isinstance(event, StepProgress):
            work.progress(StepProgress(name=work.step.name, fraction=event.fraction, detail=event.detail))

    return say


def file_digest(file: Path) -> str:
    """sha256 of a graph's file and of the weights beside it, where they lie apart."""
    whole = hashlib.sha256()
    for path in (file, file.with_name(f"{file.name}.data"), file.with_suffix(".bin")):
        if path.is_file():
            with path.open("rb") as opened:
                whole.update(hashlib.file_digest(opened, "sha256").digest())
    return whole.hexdigest()
