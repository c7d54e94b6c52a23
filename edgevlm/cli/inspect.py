"""`edgevlm inspect`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevlm.cli.common import Output, detailed_output_options

if TYPE_CHECKING:
    from edgevlm.measure.counts import Instructions
    from edgevlm.measure.explanation import Explained
    from edgevlm.measure.look_inside import EngineInside
    from edgevlm.measure.operators import OperatorRow
    from edgevlm.runtime.spec import BundleForm, Component, DetectionDecoding, Manifest, TensorSpec, TextProcessing

_OF_TARGET = "as the target says"


@click.command("inspect")
@click.argument("bundle", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--operators", "has_operators", is_flag=True, help="Profile each graph here, and say what is slow.")
@click.option("--threads", type=click.IntRange(min=0), help="With --operators: 0 means all cores; else as compiled.")
@click.option("--top", type=click.IntRange(min=1), default=15, show_default=True, help="With --operators: rows shown.")
@click.option(
    "--instructions",
    "cpu",
    is_flag=False,
    flag_value=_OF_TARGET,
    metavar="[CPU]",
    help="Count those of one run on an emulated ARM processor, such as cortex-a76; the target's own unless told.",
)
@detailed_output_options
def inspect_command(
    bundle: Path, has_operators: bool, threads: int | None, top: int, cpu: str | None, output: Output
) -> None:
    """Say what is in a bundle: task, graphs, processing, what was measured, where it comes from.

    With --operators: which operators its graphs spend their time in on this machine, and what would mend it. Then
    BUNDLE may also be a graph: an .onnx file, or OpenVINO's .xml. Of TensorRT engines: the layers that `edgevlm build`
    timed.

    With --instructions: how many instructions of which kind a run takes at one thread, the same each time. They say
    which kernels an ARM processor runs, not how fast.

    \b
    Examples:
      edgevlm inspect mobilenet-cpu/
      edgevlm inspect mobilenet-cpu/ --operators
      edgevlm inspect any-model.onnx --operators --threads 1
      edgevlm inspect mobilenet-cpu/ --instructions cortex-a53
    """
    if has_operators and cpu is not None:
        raise click.UsageError("--operators and --instructions are two questions.")
    if has_operators:
        from edgevlm.measure.look_inside import EngineInside, inspect_operators

        explained = inspect_operators(bundle, n_threads=threads)
        output.value(
            explained,
            lambda: "\n\n".join(
                engine_text(each, top=top) if isinstance(each, EngineInside) else operators_text(each, top=top)
                for each in explained
            ),
        )
        return
    if cpu is not None:
        from edgevlm.devices.instructions import count_instructions

        with output.progress() as progress:
            counted = count_instructions(bundle, None if cpu == _OF_TARGET else cpu, progress=progress)
        output.value(counted, lambda: instructions_text(counted))
        return
    from edgevlm.verbs import inspect

    manifest = inspect(bundle)
    output.value(manifest, lambda: description_text(manifest, is_verbose=output.is_verbose))


def operators_text(explained: Explained, *, top: int = 15, width: int = 96) -> str:
    """A profile for people: the slowest operators, the rest summed, and what stands out."""
    from edgevlm.cli.tables import table_text
    from edgevlm.report import notation

    profile = explained.profile
    assert profile is not None, "what could not be profiled was an error"
    inputs = "real inputs" if profile.has_real_inputs else "made-up inputs"
    title = (
        f"{' '.join(filter(None, (explained.graph, explained.name)))} on {profile.backend} {profile.version}, "
        f"{notation.count(profile.n_threads, 'thread')}: {notation.ms(profile.latency_ms)} ms, {inputs}, "
        f"{notation.count(profile.n_runs, 'run')}"
    )
    shown, rest = profile.rows[:top], profile.rows[top:]
    names = notation.shortened([row.name for row in shown], 36)
    lines = [
        (name, row.op_type, row.precision, notation.ms(row.time_ms), notation.percent(row.share), _rate(row))
        for name, row in zip(names, shown, strict=True)
    ]
    if rest:
        time_ms, share = sum(row.time_ms for row in rest), sum(row.share for row in rest)
        lines.append((notation.count(len(rest), "other"), "", "", notation.ms(time_ms), notation.percent(share), ""))
    header = ("operator", "type as run", "computes in", "ms", "share", "GMAC/s")
    parts = [title, table_text(header, lines, right=(3, 4, 5))]
    kinds = ", ".join(
        f"{kind} {notation.percent(time_ms / profile.operators_ms)}"
        for kind, time_ms in explained.by_kind_ms.items()
        if profile.operators_ms and time_ms / profile.operators_ms >= 0.001
    )
    parts.append(textwrap.fill(f"By kind of work: {kinds}.", width))
    for finding in explained.findings:
        told = textwrap.wrap(f"{finding.kind}: {finding.what}", width, initial_indent="! ", subsequent_indent="  ")
        told += textwrap.wrap(finding.remedy, width, initial_indent="  → ", subsequent_indent="    ")
        if finding.where:
            # Names are never wrapped: people search for them.
            told.append(f"  at {', '.join(finding.where)}{', …' if finding.n > len(finding.where) else ''}")
        parts.append("\n".join(told))
    if not explained.findings:
        parts.append("Nothing stands out.")
    return "\n\n".join(parts)


def engine_text(inside: EngineInside, *, top: int = 15) -> str:
    """An engine's layers for people: the slowest, and the rest summed."""
    from edgevlm.cli.tables import table_text
    from edgevlm.report import notation

    what = " ".join(filter(None, (inside.form, inside.graph, inside.precision)))
    if inside.layers is None:
        return f"{what} on {inside.backend}: not profiled: {inside.failure}"
    layers = inside.layers
    title = (
        f"{what} on {layers.device}, by {layers.measured_by}: {notation.count(len(layers.layers), 'layer')}, "
        f"{notation.ms(layers.total_ms)} ms in all with waits between them, {notation.count(layers.n_runs, 'run')}"
    )
    shown = layers.slowest(top)
    names = notation.shortened([layer.name for layer in shown], 60)
    lines = [
        (name, layer.kind, layer.precision, notation.ms(layer.time_ms), notation.percent(layer.share))
        for name, layer in zip(names, shown, strict=True)
    ]
    if n_rest := len(layers.layers) - len(shown):
        rest = layers.total_ms - sum(layer.time_ms or 0.0 for layer in shown)
        share = rest / layers.total_ms if layers.total_ms else 0.0
        lines.append((notation.count(n_rest, "other"), "", "", notation.ms(rest), notation.percent(share)))
    return f"{title}\n\n{table_text(('layer', 'kind', 'reads', 'ms', 'share'), lines, right=(3, 4))}"


def instructions_text(counted: Instructions) -> str:
    """Counts for people, the largest class first."""
    from edgevlm.cli.tables import table_text
    from edgevlm.report import notation

    parts = []
    for graph in counted.graphs:
        rows = [
            (name, f"{n:,}", notation.percent(n / graph.n_instructions))
            for name, n in sorted(graph.by_class.items(), key=lambda item: -item[1])
            if n
        ]
        name = f"{graph.form}, {graph.graph}" if graph.form else graph.graph
        title = (
            f"{name} {graph.precision} on {counted.cpu} (emulated), 1 thread: "
            f"{graph.n_instructions:,} instructions a run"
        )
        parts += [title, table_text(("instructions", "a run", "share"), rows, right=(1, 2))]
    parts += [f"{form}: not counted: {why}" for form, why in counted.left_out.items()]
    return "\n\n".join([*parts, "Counts, not times: one instruction is not as fast as another."])


def _rate(row: OperatorRow) -> str:
    from edgevlm.report import notation

    return notation.ms(row.macs / row.time_ms / 1e6) if row.macs and row.time_ms else ""


def description_text(manifest: Manifest, *, is_verbose: bool = False) -> str:
    """A manifest for people; ``is_verbose`` adds its files and the tools that made it."""
    from edgevlm.cli.tables import table_text
    from edgevlm.report import notation

    rows = [
        ("task", manifest.task),
        ("target", manifest.target),
        ("source", _source(manifest)),
        ("chosen", f"{manifest.selection}: {manifest.selection_reason}"),
        ("size", notation.size(sum(file.n_bytes for file in manifest.files))),
        *((f"graph {part.name}", _component(part)) for part in manifest.components),
        ("picture", _picture(manifest)),
    ]
    if manifest.processing.text:
        rows.append(("text", _text(manifest.processing.text)))
    if manifest.processing.detection:
        rows.append(("boxes", _boxes(manifest.processing.detection)))
    if manifest.labels:
        shown = ", ".join(manifest.labels[:4])
        rows.append(("labels", f"{len(manifest.labels)}: {shown}{', …' if len(manifest.labels) > 4 else ''}"))
    if manifest.latency:
        rows.append(("latency", _latency(manifest)))
    if manifest.accuracy:
        rows.append(("accuracy", _accuracy(manifest)))
    rows += [(f"form {form.name}", _form(form)) for form in manifest.forms]
    rows.append(("requires", _requires(manifest)))
    rows.append(("golden", f"{len(manifest.golden.cases)} pictures; replay them with `edgevlm verify`"))
    if is_verbose:
        rows += [("made with", f"{name} {version}") for name, version in sorted(manifest.provenance.tools.items())]
        rows += [(file.path, f"{notation.size(file.n_bytes)}  sha256 {file.sha256[:16]}…") for file in manifest.files]
    return f"{manifest.name}\n{table_text(('', ''), rows).lstrip()}"


def _source(manifest: Manifest) -> str:
    made = manifest.provenance
    revision = f" at {made.revision}" if made.revision else ""
    return (
        f"{made.source}{revision}, weights sha256 {made.weights_sha256[:16]}…, licence {made.licence or 'not stated'}"
    )


def _component(part: Component) -> str:
    threads = part.session.n_threads or "all"
    ends = f"{', '.join(map(_tensor, part.inputs))} → {', '.join(map(_tensor, part.outputs))}"
    return f"{part.precision} on {part.backend}, {threads} threads: {ends}"


def _tensor(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype}[{', '.join(map(str, spec.shape))}]"


def _picture(manifest: Manifest) -> str:
    image = manifest.processing.image
    steps = ", ".join(step.__struct_config__.tag.replace("_", " ") for step in image.steps)  # type: ignore[union-attr]
    return f"{image.height}×{image.width}: {steps}"


def _text(text: TextProcessing) -> str:
    padded = "padded to them" if text.padding == "max_length" else "each call as long as its longest text"
    return f"at most {text.max_length} tokens, {padded}"


def _boxes(decoding: DetectionDecoding) -> str:
    from edgevlm.runtime.spec import GridDecoding

    described = f"from {decoding.__struct_config__.tag}, score above {decoding.score_threshold:g}"
    if isinstance(decoding, GridDecoding):
        described += (
            f", strides {', '.join(map(str, decoding.strides))}, overlap of a class at most {decoding.nms_iou:g}"
        )
    return f"{described}, at most {decoding.max_detections} in a picture"


def _latency(manifest: Manifest) -> str:
    latency = manifest.latency
    assert latency is not None
    ratio = ""
    if latency.ratio is not None:
        ratio = f"; {latency.ratio:.2f} × float's time [{latency.ratio_low:.2f}, {latency.ratio_high:.2f}]"
    return f"p50 {latency.p50_ms:.2f} ms, {latency.n_threads} threads, batch {latency.batch}, {latency.machine}{ratio}"


def _accuracy(manifest: Manifest) -> str:
    accuracy = manifest.accuracy
    assert accuracy is not None
    drop = f"{accuracy.drop:.2%} [{accuracy.drop_low:.2%}, {accuracy.drop_high:.2%}]"
    others = "".join(f"; {name} {value:.2%}" for name, value in accuracy.others.items())
    of = f"{accuracy.n} pictures of {accuracy.data}"
    return f"{accuracy.metric} {accuracy.value:.2%} on {of}; drop from float {drop}{others}"


def _form(form: BundleForm) -> str:
    backends = ", ".join(dict.fromkeys(part.backend for part in form.components))
    why = f": {form.why_not_built}" if form.why_not_built else ""
    return f"on {backends}, {'ready to tune' if form.status == 'ready' else form.status}{why}"


def _requires(manifest: Manifest) -> str:
    requires = manifest.requires
    parts = [f"{name} ≥ {version}" for name, version in requires.backends.items()]
    parts += [requires.arch] if requires.arch else []
    parts += list(requires.isa)
    return ", ".join(parts)
