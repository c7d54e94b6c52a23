"""Everything of a bundle but its report: graphs, processing, golden vectors, manifest, bill of materials."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from edgevlm.bundle.golden import how_far_apart, make_golden
from edgevlm.bundle.sbom import bill_of_materials
from edgevlm.data.annotated import MASKS, things_of
from edgevlm.data.prompts import prompts_of_things
from edgevlm.export import Exported
from edgevlm.extras import tool_versions
from edgevlm.job import Work, place
from edgevlm.lowering import load_lowering
from edgevlm.measure.spec import Comparison
from edgevlm.plan import TEXT_ENCODER
from edgevlm.runtime.machine import describe_machine
from edgevlm.runtime.spec import (
    SCHEMA_VERSION,
    BundleForm,
    Component,
    Golden,
    Latency,
    Manifest,
    Processing,
    Prompt,
    Provenance,
    SessionOptions,
)
from edgevlm.runtime.tasks.mask_generation import MASK_DECODER, decoder_prompts
from edgevlm.search.choose import FLOAT
from edgevlm.search.spec import SearchResult, Variant
from edgevlm.steps.confirm import Confirmation
from edgevlm.steps.engines import EngineFiles, as_data, engine_files
from edgevlm.steps.inputs import TOKENIZER, processing_files, processing_folder, processing_of, text_inputs
from edgevlm.steps.judging import open_pipeline, scoring_of
from edgevlm.steps.requires import requires_of
from edgevlm.store import read_spec, write_spec
from edgevlm.target import is_gpu, why_not_at_hand

if TYPE_CHECKING:
    from edgevlm.data.shapes import Picture

N_GOLDEN = 3
_GOLDEN_SEED = 77  # of no picture that calibrates, selects or reports

# Another machine's float kernels add in another order, and int8 kernels without VNNI saturate at 16 bits, which moved
# outputs by 1.2 % where it was tried; what differs by more than this is wrong.
_TOLERANCES = {FLOAT: 1e-4}
_FLOATS = {FLOAT, "fp16", "bf16"}
_QUANTIZED_TOLERANCE = 0.03
# What lies between int8 layers is float, and a last digit there moves a code to its neighbour: the more that quantizing
# itself has moved an output, the further. OpenVINO's int8 MobileViT-XXS is 26 % off its float, 4 % off itself on ARM.
_SHARE_OF_QUANTIZING = 0.5
# A processor without bfloat16 computes in float32 instead: MobileNetV2's outputs then move by up to 6 %.
_BF16_TOLERANCE = 0.1

# TensorFloat-32 has 10 bits of fraction, and TensorRT fuses what ONNX Runtime rounds in between.
_GPU_TOLERANCE = 0.05

RUNTIME_PACKAGES = ("edgevlm", "onnxruntime", "numpy", "pillow", "tokenizers", "msgspec")
"""What every device has; it also needs the backends that the bundle's graphs are for."""
TOOLS = ("edgevlm", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow", "tokenizers")


def run(work: Work) -> None:
    """``manifest.json`` (without its list of files) and the files below ``files/``."""
    found = read_spec(work.inputs["search"] / "search.json", SearchResult)
    confirmed = read_spec(work.inputs["confirm"] / "confirmation.json", Confirmation)
    model, search = work.job.model, work.inputs["search"]
    variants = found.variants_of(confirmed.winner)
    first = _placed(work, found, confirmed.winner)
    for path, source in processing_files(work.job, work.inputs.get("fold")).items():
        place(source, work.out / "files" / path)
    forms = _forms(work, found, confirmed, first)
    components, golden = first.components, first.golden
    selection, reason = _selection(work, found, confirmed)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=work.step.params["name"],
        task=model.task,
        target=work.step.params["target"],
        selection=selection,
        selection_reason=reason,
        batch=work.job.request.batch,
        components=components,
        processing=_processing(processing_of(work), has_text=any(c.name == TEXT_ENCODER for c in components)),
        labels=work.job.request.labels or model.labels,
        scoring=scoring_of(work),
        accuracy=confirmed.accuracy,
        latency=latency(found, confirmed.winner, batch=work.job.request.batch or 1),
        requires=requires_of(variants, search, work.job.target.runtimes),
        provenance=Provenance(
            source=_public(work.step.params["asked"]),
            revision=model.source.revision,
            weights_sha256=model.source.weights_sha256,
            licence=work.step.params["licence"],
            tools=tool_versions(*TOOLS, *_tools_of(variants)),
            recipe=_recipe(variants),
        ),
        golden=golden,
        files=(),
        forms=forms,
    )
    parts = (*components, *(part for form in forms for part in form.components))
    used = dict.fromkeys(part.backend for part in parts)
    materials = bill_of_materials(manifest, runtime_packages=tool_versions(*RUNTIME_PACKAGES, *used))
    (work.out / "files" / "sbom.cdx.json").write_bytes(materials)
    write_spec(work.out / "manifest.json", manifest)


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A form among the bundle's files.

    Args:
        engine: of a form that TensorRT runs; where it has several graphs, the last one's.
    """

    components: tuple[Component, ...]
    golden: Golden
    engine: EngineFiles | None = None


def _placed(work: Work, found: SearchResult, name: str, *, form: str = "") -> Placed:
    """A candidate's graphs and golden vectors among the bundle's files; those of a ``form`` in folders of its name."""
    search, variants = work.inputs["search"], found.variants_of(name)
    folder = f"components/{form}" if form else "components"
    components, engine = [], None
    for variant in variants:
        # Graphs are called so from their export on; weights beside them are found by their name, so they keep it.
        sources: dict[str, Path | bytes] = {Path(file).name: search / file for file in variant.files}
        if is_gpu(variant.backend):
            engine = engine_files(work, variant, fed=_fed(work, variant.graph))
            sources = dict(engine.files)
        paths = {f"{folder}/{file}": source for file, source in sources.items()}
        components.append(_component(work, variant, tuple(paths)))
        for path, source in paths.items():
            _put(work.out / "files" / path, source)
    with processing_folder(work.job, work.inputs.get("fold")) as files_of_processing:
        pipeline = open_pipeline(work, variants, search, Path(files_of_processing))
        pictures, moved = _golden_pictures(work), 0.0
        if any(variant.precision not in _FLOATS for variant in variants):
            of_float = open_pipeline(work, found.variants_of(FLOAT), search, Path(files_of_processing))
            moved = how_far_apart(pipeline, of_float, pictures)
        golden, files = make_golden(
            pipeline,
            pictures,
            components=tuple(components),
            tolerance=tolerance_of(variants, moved),
            labels=() if pipeline.labels else _golden_labels(work),
            prompts=_golden_prompts(work),
            form=form,
        )
    for path, data in files.items():
        _put(work.out / "files" / path, data)
    return Placed(components=tuple(components), golden=golden, engine=engine)


def _put(target: Path, source: Path | bytes) -> None:
    if isinstance(source, Path):
        place(source, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source)


def _forms(work: Work, found: SearchResult, confirmed: Confirmation, first: Placed) -> tuple[BundleForm, ...]:
    """What the device chooses from, where nothing was timed."""
    forms = []
    for name, accuracy in confirmed.offered.items():
        variants = found.variants_of(name)
        placed = first if name == confirmed.winner else _placed(work, found, name, form=name)
        judges = dict.fromkeys(load_lowering(variant.backend).judged_by for variant in variants)
        forms.append(
            BundleForm(
                name=name,
                components=placed.components,
                requires=requires_of(variants, work.inputs["search"], work.job.target.runtimes),
                golden=placed.golden,
                accuracy=accuracy,
                recipe=_recipe(variants),
                judged_by=" and ".join(f"{judge} {tool_versions(judge)[judge]}" for judge in judges),
                status=placed.engine.status if placed.engine else "ready",
                why_not_built=placed.engine.why_not_built if placed.engine else "",
                build=as_data(placed.engine.settings) if placed.engine else {},
            )
        )
    return tuple(forms)


def tolerance_of(variants: Sequence[Variant], moved: float) -> float:
    """How far the outputs of these graphs may be off on another machine.

    Args: moved: how far quantizing moved them, as a part of the largest; what is not finite allows nothing more.
    """
    least = max(_tolerance(variant) for variant in variants)
    return max(least, round(_SHARE_OF_QUANTIZING * moved, 3)) if math.isfinite(moved) else least


def _tolerance(variant: Variant) -> float:
    if is_gpu(variant.backend):
        return _GPU_TOLERANCE
    return _BF16_TOLERANCE if "bf16" in variant.precision else _TOLERANCES.get(variant.precision, _QUANTIZED_TOLERANCE)


def latency(found: SearchResult, winner: str, *, batch: int) -> Latency | None:
    """Of the whole candidate: all its graphs, one after another; None where nothing was timed.

    Args: batch: of the pictures; a text tower is timed with one text.
    """
    row = found.row(winner)
    if not found.timings:
        return None
    first: Comparison = found.comparisons[0]
    measured = [found.measurement(variant) for variant in found.variants_of(winner)]
    assert row.p50_ms is not None and row.p90_ms is not None and row.p99_ms is not None, "what wins was measured"
    return Latency(
        p50_ms=row.p50_ms,
        p90_ms=row.p90_ms,
        p99_ms=row.p99_ms,
        n=min(len(m.samples_ms()) for m in measured),
        n_threads=measured[0].n_threads,
        batch=batch,
        ratio=row.ratio,
        ratio_low=row.ratio_low,
        ratio_high=row.ratio_high,
        machine=first.environment.machine,
    )


def _component(work: Work, variant: Variant, files: tuple[str, ...]) -> Component:
    exported = read_spec(work.inputs[f"export:{variant.graph}"] / "exported.json", Exported)
    return Component(
        name=variant.graph,
        backend=variant.backend,
        file=files[0],
        files=files,
        inputs=exported.inputs,
        outputs=exported.outputs,
        precision=variant.precision,
        session=SessionOptions() if is_gpu(variant.backend) else variant.session,
    )


def _selection(
    work: Work, found: SearchResult, confirmed: Confirmation
) -> tuple[Literal["measured", "float-fallback", "unmeasured", "requested"], str]:
    if not work.job.request.is_measured:
        why = why_not_at_hand(work.job.target, describe_machine())
        return "unmeasured", f"{work.job.target.name} is not at hand: {why}"
    rejected = "; ".join(f"{r.name} lost {r.drop:.2%} on the report split" for r in confirmed.rejected)
    after = f" ({rejected})" if rejected else ""
    is_free = work.job.request.precision == "auto" or (work.job.request.precision == FLOAT and work.job.ready_made)
    if not is_free:
        return "requested", f"--precision {work.job.request.precision} was asked for{after}"
    if confirmed.winner != FLOAT:
        return "measured", f"the fastest inside the budgets{after}"
    if not found.is_valid:
        return "float-fallback", f"nothing could be measured validly: {'; '.join(found.reasons)}"
    return "float-fallback", f"nothing inside the budgets is surely faster than float{after}"


def _golden_pictures(work: Work) -> list[Any]:
    return [picture.image for picture in _golden_shapes(work)]


def _golden_shapes(work: Work) -> list[Picture]:
    from edgevlm.data.shapes import picture

    # Larger than the graph's input where that is small, so that resizing is part of what is replayed.
    side = min(max(work.job.model.processing.image.height, 64), 512)
    return [picture(i, seed=_GOLDEN_SEED, size=side) for i in range(N_GOLDEN)]


def _golden_prompts(work: Work) -> tuple[tuple[Prompt, ...], ...]:
    """A box and a point for each thing, where the model is asked about places."""
    if work.job.model.task != MASKS:
        return ()
    shapes = _golden_shapes(work)
    things = [things_of([thing.mask for thing in each.objects], each.image.shape[:2]) for each in shapes]
    return tuple(map(prompts_of_things, things))


def _golden_labels(work: Work) -> tuple[str, ...]:
    from edgevlm.data.shapes import class_names

    return class_names()[:4] if work.job.model.processing.text else ()


def _fed(work: Work, graph: str) -> tuple[dict[str, int], ...]:
    """What a graph is fed, by the name of each free dimension: one question, and what golden vectors ask."""
    if graph == TEXT_ENCODER:
        text = processing_of(work).text
        assert text is not None, "a text tower comes with its processing"
        texts = [text.prompt_template.replace("{}", label) for label in _golden_labels(work)]
        found = [text_inputs(work.job, asked, text)["input_ids"].shape for asked in (texts[:1], texts)]
        return tuple({"batch": n, "sequence": length} for n, length in found)
    if graph == MASK_DECODER:
        image = work.job.model.processing.image
        cases = zip(_golden_prompts(work), _golden_shapes(work), strict=True)
        found = [
            decoder_prompts([asked], [each.image.shape[:2]], image)["input_points"].shape[1:3] for asked, each in cases
        ]
        return tuple({"batch": 1, "prompts": n, "points": n_points} for most, n_points in found for n in (1, most))
    return ({"batch": 1},)


def _processing(processing: Processing, *, has_text: bool) -> Processing:
    if not has_text or processing.text is None:
        return msgspec.structs.replace(processing, text=None)
    return msgspec.structs.replace(processing, text=msgspec.structs.replace(processing.text, tokenizer=TOKENIZER))


def _tools_of(variants: tuple[Variant, ...]) -> tuple[str, ...]:
    """Distributions that made the graphs, beside those that every compile has."""
    used = dict.fromkeys(tool for variant in variants for tool in load_lowering(variant.backend).tools)
    return tuple(tool for tool in used if tool not in TOOLS)


def _recipe(variants: tuple[Variant, ...]) -> dict[str, Any]:
    machine = describe_machine()
    return {
        "graphs": {v.graph: {"variant": v.name, **v.recipe} for v in variants},
        "made_on": f"{machine.name} ({machine.arch})",
    }


def _public(asked: str) -> str:
    """What the user named, without the folders of the machine that it lay on."""
    return Path(asked).name if re.match(r"[./~]|[A-Za-z]:[\\/]", asked) else asked
