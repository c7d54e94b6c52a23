"""Text towers with small weights: how much size, accuracy and time each form costs.

    python -m benchmarks.weight_only

Two towers: the demo model's, which is trained, for what the forms do to a ranking; and one of the size of CLIP
ViT-B/32's with random weights, for size and for time at 1, 8 and 77 tokens, the forms taking turns, each in its own
process. Results and raw samples go to `results/weight_only.json`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from PIL import Image

from edgevlm.data.shapes import Pictures, class_names
from edgevlm.export import export_graph
from edgevlm.ingest import read_model
from edgevlm.measure.environment import describe_environment
from edgevlm.measure.interleave import compare
from edgevlm.measure.spec import Comparison, Environment, Protocol, Subject
from edgevlm.model import Model
from edgevlm.quantization.half import fp16_graph
from edgevlm.quantization.post_training import prepare, quantize
from edgevlm.quantization.schemes import dynamic_scheme
from edgevlm.quantization.weight_only import WEIGHT_SCHEMES, WeightScheme, quantize_weights
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.image import preprocess
from edgevlm.runtime.spec import Array, SessionOptions, Spec, to_json
from edgevlm.runtime.text import load_tokenizer, tokenize
from edgevlm.steps.inputs import save_inputs

HERE = Path(__file__).parent
FLOAT = "fp32"
N_PICTURES, SEED = 500, 2024  # a seed that neither training nor its evaluation used
N_RANDOM_TEXTS = 64
LENGTHS = (1, 8, 77)
# Forms that are not offered, beside those that are: what each choice is worth.
OTHERS = (
    WeightScheme(name="int4-weights-block32-symmetric", bits=4, block_size=32, is_symmetric=True),
    WeightScheme(name="int4-weights-block32-embedding4", bits=4, block_size=32, is_symmetric=False, embedding_bits=4),
    WeightScheme(
        name="int4-weights-block32-float-embedding", bits=4, block_size=32, is_symmetric=False, embedding_bits=None
    ),
    WeightScheme(name="int4-weights-block16", bits=4, block_size=16, is_symmetric=False),
    WeightScheme(name="int8-weights-block32", bits=8, block_size=32, is_symmetric=True),
)


class Ranking(Spec, frozen=True, kw_only=True):
    """How a form of a trained tower orders things, against float; shares from 0 to 1.

    Args:
        text_pairs: of all pairs of texts, seen from every other text, those ordered alike by similarity.
        nearest_text: texts whose nearest other text is the same.
        picture_pairs: of all pairs of labels, seen from every picture, those ordered alike.
        nearest_label: pictures whose first label is the same.
        accuracy: pictures whose first label is right.
        float_accuracy: the same of the float tower.
    """

    text_pairs: float
    nearest_text: float
    picture_pairs: float
    nearest_label: float
    accuracy: float
    float_accuracy: float


class Row(Spec, frozen=True, kw_only=True):
    """One form of one tower.

    Args:
        size_ratio: bytes over the float graph's.
        cosine_min: over the texts, with the float tower's vector; ``cosine_mean`` likewise.
        centred_cosine_min: the same after taking away the float vectors' mean, which all texts share.
        runs: what ONNX Runtime runs, in words.
    """

    name: str
    n_bytes: int
    size_ratio: float
    cosine_min: float
    cosine_mean: float
    centred_cosine_min: float
    runs: str
    ranking: Ranking | None = None


class Tower(Spec, frozen=True, kw_only=True):
    """``timings``: one for each number of tokens, the float graph being the baseline; batch 1."""

    name: str
    rows: tuple[Row, ...]
    timings: dict[str, Comparison] = {}


class Result(Spec, frozen=True, kw_only=True):
    schema_version: int
    command: str
    made_at: str
    towers: tuple[Tower, ...]
    environment: Environment


@click.command()
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--budget-s", default=90.0, show_default=True, help="For timing the forms at one length.")
def main(threads: int, budget_s: float) -> None:
    """Takes about ten minutes on two cores."""
    with tempfile.TemporaryDirectory(prefix="edgevlm-benchmark-") as folder:
        towers = (_demo(Path(folder) / "demo"), _random(Path(folder) / "random", threads, budget_s))
    result = Result(
        schema_version=1,
        command="python -m benchmarks.weight_only",
        made_at=time.strftime("%Y-%m-%d", time.gmtime()),
        towers=towers,
        environment=describe_environment(),
    )
    (HERE / "results" / "weight_only.json").write_bytes(to_json(result))
    click.echo(table(result))


def table(result: Result) -> str:
    """The rows as Markdown."""
    lines = []
    for tower in result.towers:
        lengths = list(tower.timings)
        heads = ["size", "cosine, min", "centred", "text pairs", "nearest text", "picture pairs", "nearest label"]
        lines += ["", f"| {tower.name} | " + " | ".join([*heads, *(f"{n} tokens, ms" for n in lengths)]) + " |"]
        lines += ["|---" * (1 + len(heads) + len(lengths)) + "|"]
        for row in tower.rows:
            ranking = row.ranking
            shares = (
                [ranking.text_pairs, ranking.nearest_text, ranking.picture_pairs, ranking.nearest_label]
                if ranking
                else []
            )
            cells = [f"{row.size_ratio:.3f}", f"{row.cosine_min:.4f}", f"{row.centred_cosine_min:.4f}"]
            cells += [f"{share:.3f}" for share in shares] or [""] * 4
            cells += [_time(tower.timings[n], row.name) for n in lengths]
            lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _time(comparison: Comparison, name: str) -> str:
    if not comparison.has(name) or comparison.measurement(name).failure:
        return ""
    return f"{comparison.measurement(name).percentile_ms(50):.2f}"


# --- forms ------------------------------------------------------------------------------------------------


def _forms(graph: Path, folder: Path, feed: dict[str, Array]) -> dict[str, tuple[Path, str]]:
    """Every form of a graph, each in a folder of its own, with what runs in words."""
    prepared = prepare(graph, folder / "prepared.onnx")
    made = {FLOAT: (prepared, "as exported")}
    dynamic = dynamic_scheme()

    def file(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name / "text.onnx"

    def add(name: str, make: Callable[[Path], Any]) -> None:
        out = file(name)
        made[name] = (out, make(out).describe())

    add("fp16", lambda out: fp16_graph(prepared, [feed], out=out))
    for name, bits in ((dynamic.name, 8), (f"{dynamic.name}-float-embedding", None)):
        scheme = msgspec.structs.replace(dynamic, embedding_bits=bits)
        add(name, lambda out, scheme=scheme: quantize(prepared, scheme, ranges=None, out=out).fusion)
    for weights in (*WEIGHT_SCHEMES, *OTHERS):
        add(weights.name, lambda out, weights=weights: quantize_weights(prepared, weights, out=out).fusion)
    return made


def _rows(forms: dict[str, tuple[Path, str]], feed: dict[str, Array], rank: Callable[..., Ranking] | None) -> list[Row]:
    n_float = forms[FLOAT][0].stat().st_size
    reference = _run(forms[FLOAT][0], feed)
    mean = reference.mean(axis=0)
    rows = []
    for name, (file, runs) in forms.items():
        vectors = _run(file, feed)
        cosines = (unit(vectors) * unit(reference)).sum(axis=1)
        centred = (unit(vectors - mean) * unit(reference - mean)).sum(axis=1)
        rows.append(
            Row(
                name=name,
                n_bytes=file.stat().st_size,
                size_ratio=file.stat().st_size / n_float,
                cosine_min=float(cosines.min()),
                cosine_mean=float(cosines.mean()),
                centred_cosine_min=float(centred.min()),
                runs=runs,
                ranking=rank(reference, vectors) if rank else None,
            )
        )
    return rows


def _run(file: Path, feed: dict[str, Array]) -> Array:
    session = load_backend("onnxruntime").open(file, SessionOptions(n_threads=1))
    return next(iter(session.run(feed).values()))


def unit(vectors: Array) -> Array:
    """Each row at length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def pairs_alike(scores: Array, others: Array) -> float:
    """Of all pairs in a row, over all rows, those that two tables of scores order alike.

    Shapes:  both [rows, n].
    Example:
        >>> pairs_alike(np.array([[3.0, 2.0, 1.0]]), np.array([[2.0, 3.0, 1.0]])).__round__(3)
        0.667
    """
    first, second = np.triu_indices(scores.shape[1], 1)
    alike = np.sign(scores[:, first] - scores[:, second]) == np.sign(others[:, first] - others[:, second])
    return float(alike.mean())


# --- towers -----------------------------------------------------------------------------------------------


def _demo(folder: Path) -> Tower:
    """The trained tower, with the demo's own labels and generated pictures that nothing has seen."""
    model = read_model("demo")
    pictures = Pictures(n=N_PICTURES, seed=SEED)
    pixels = np.stack([preprocess(Image.fromarray(p.image), model.processing.image) for p in pictures])
    truth = np.array([class_names().index(p.label) for p in pictures])
    texts = _demo_texts(model)
    image_input = {model.processing.image.input_name: pixels}
    text = export_graph(model, "text_encoder", batch=None, out=folder, samples=_few(texts))
    image = export_graph(model, "image_encoder", batch=None, out=folder, samples=_few(image_input))
    seen = unit(_run(folder / image.file, image_input))

    def rank(reference: Array, vectors: Array) -> Ranking:
        expected, got = unit(reference), unit(vectors)
        to_texts, to_texts_got = _without_self(expected @ expected.T), _without_self(got @ got.T)
        labels, labels_got = seen @ expected.T, seen @ got.T
        return Ranking(
            text_pairs=pairs_alike(to_texts, to_texts_got),
            nearest_text=float((to_texts.argmax(1) == to_texts_got.argmax(1)).mean()),
            picture_pairs=pairs_alike(labels, labels_got),
            nearest_label=float((labels.argmax(1) == labels_got.argmax(1)).mean()),
            accuracy=float((labels_got.argmax(1) == truth).mean()),
            float_accuracy=float((labels.argmax(1) == truth).mean()),
        )

    rows = _rows(_forms(folder / text.file, folder, texts), texts, rank)
    return Tower(name="demo text tower, trained", rows=tuple(rows))


def _demo_texts(model: Model) -> dict[str, Array]:
    processing = model.processing.text
    assert processing is not None, "the demo has a text tower"
    prompts = [processing.prompt_template.replace("{}", label) for label in class_names()]
    return tokenize(prompts, load_tokenizer(Path(model.tokenizer_file), processing), processing)


def _few(inputs: dict[str, Array]) -> dict[str, Array]:
    return {name: value[:5] for name, value in inputs.items()}


def _without_self(similarity: Array) -> Array:
    n = len(similarity)
    return similarity[~np.eye(n, dtype=bool)].reshape(n, n - 1)


def _random(folder: Path, n_threads: int, budget_s: float) -> Tower:
    """A tower of the size of CLIP ViT-B/32's, its number of tokens free."""
    folder.mkdir()
    forms = _forms(_export_random(folder / "text.onnx"), folder, _ids(8, n_texts=4))
    rows = _rows(forms, _ids(8, n_texts=N_RANDOM_TEXTS), None)
    timed = [FLOAT, "fp16", dynamic_scheme().name, *(scheme.name for scheme in WEIGHT_SCHEMES), OTHERS[0].name]
    protocol = Protocol(halve_at=(), n_rounds=20, min_rounds=10, budget_s=budget_s)
    timings = {}
    for length in LENGTHS:
        inputs = save_inputs(folder / f"{length}.npz", _ids(length, n_texts=1))
        subjects = [
            Subject(
                name=name,
                backend="onnxruntime",
                file=str(forms[name][0]),
                inputs=str(inputs),
                session=SessionOptions(n_threads=n_threads),
            )
            for name in timed
        ]
        click.echo(f"{length} tokens")
        timings[str(length)] = compare(subjects, baseline=FLOAT, protocol=protocol)
    return Tower(name="text tower of ViT-B/32's size, random weights", rows=tuple(rows), timings=timings)


def _ids(length: int, *, n_texts: int) -> dict[str, Array]:
    """Random words; the last one is the end, where the tower is read."""
    ids = np.random.default_rng(SEED).integers(0, 49406, (n_texts, length))
    ids[:, -1] = 49407
    return {"input_ids": ids}


def _export_random(file: Path) -> Path:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(SEED)
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        projection_dim=512,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    tower = CLIPTextModelWithProjection(config).eval()

    class Embeds(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, input_ids: Any) -> Any:
            return self.tower(input_ids=input_ids).text_embeds

    program = torch.onnx.export(
        Embeds().eval(),
        (torch.from_numpy(_ids(8, n_texts=2)["input_ids"]),),
        dynamo=True,
        opset_version=20,
        input_names=["input_ids"],
        output_names=["text_embeds"],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim("n_tokens", min=1, max=77)},),
        verbose=False,
    )
    program.save(str(file), external_data=False)
    return file


if __name__ == "__main__":
    main()
