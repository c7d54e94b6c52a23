"""`edgevlm inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevlm.cli.common import Output, detailed_output_options

if TYPE_CHECKING:
    from edgevlm.runtime.spec import Component, Manifest, TensorSpec, TextProcessing


@click.command("inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@detailed_output_options
def inspect_command(bundle: Path, output: Output) -> None:
    """Say what is in a bundle: task, graphs, processing, what was measured, where it comes from.

    \b
    Example:
      edgevlm inspect mobilenet-cpu/
    """
    from edgevlm.verbs import inspect

    manifest = inspect(bundle)
    output.value(manifest, lambda: description_text(manifest, is_verbose=output.is_verbose))


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
    if manifest.labels:
        shown = ", ".join(manifest.labels[:4])
        rows.append(("labels", f"{len(manifest.labels)}: {shown}{', …' if len(manifest.labels) > 4 else ''}"))
    if manifest.latency:
        rows.append(("latency", _latency(manifest)))
    if manifest.accuracy:
        rows.append(("accuracy", _accuracy(manifest)))
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
    return f"{accuracy.metric} {accuracy.value:.2%} on {accuracy.n} pictures of {accuracy.data}; drop from float {drop}"


def _requires(manifest: Manifest) -> str:
    requires = manifest.requires
    parts = [f"{name} ≥ {version}" for name, version in requires.backends.items()]
    parts += [requires.arch] if requires.arch else []
    parts += list(requires.isa)
    return ", ".join(parts)
