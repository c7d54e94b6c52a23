"""`edgevlm run`."""

from __future__ import annotations

from pathlib import Path

import click

from edgevlm.cli.common import Output, labels_option, short_output_options


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("pictures", nargs=-1, required=True, metavar="PICTURE...")
@click.option("--labels", callback=labels_option, help="Labels to choose from: a file with one a line, or a,b,c.")
@click.option("--top", "top_k", type=click.IntRange(min=1), help="Answers to show: 5 classes or every box if left out.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; as compiled where left out.")
@short_output_options
def run_command(
    bundle: Path,
    pictures: tuple[str, ...],
    labels: tuple[str, ...],
    top_k: int | None,
    threads: int | None,
    output: Output,
) -> None:
    """Answer for pictures with a bundle. Needs no PyTorch.

    \b
    Examples:
      edgevlm run mobilenet-cpu/ picture.jpg
      edgevlm run clip-cpu/ *.jpg --labels "a cat,a dog" --json
    """
    from edgevlm.runtime.pipeline import Pipeline

    pipeline = Pipeline.load(bundle, n_threads=threads)
    results = {name: pipeline(name, labels=labels or None, top_k=top_k) for name in pictures}

    def text() -> str:
        if len(results) == 1:
            return next(iter(results.values())).to_text()
        return "\n\n".join(f"{name}\n{result.to_text()}" for name, result in results.items())

    output.value(results if len(results) > 1 else next(iter(results.values())), text)
