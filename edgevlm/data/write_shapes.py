"""`python -m edgevlm.data.write_shapes FOLDER`: some of the built-in pictures as PNG files, to try commands on."""

from __future__ import annotations

from pathlib import Path

import click

from edgevlm.data.shapes import MAX_SIZE, MIN_SIZE, write_folder


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-n", "n", type=click.IntRange(min=1), default=100, show_default=True, help="Pictures to write.")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True)
@click.option("--size", type=click.IntRange(MIN_SIZE, MAX_SIZE), default=64, show_default=True, help="Pixels.")
@click.option("--layout", type=click.Choice(["folders", "csv"]), default="folders", show_default=True,
              help="A folder for each class, or one folder and a labels.csv.")  # fmt: skip
def main(folder: Path, n: int, seed: int, size: int, layout: str) -> None:
    """Write generated pictures of coloured shapes, with their labels, into a new FOLDER."""
    if folder.exists():
        raise click.UsageError(f"'{folder}' exists already; name a new folder.")
    write_folder(folder, n=n, seed=seed, size=size, layout="csv" if layout == "csv" else "folders")
    click.echo(f"{n} pictures in {folder}")


if __name__ == "__main__":
    main()
