"""Sentences of 8 tokens at their own length, against the same padded to all that the text tower takes.

    python -m benchmarks.text_length --assets ../shared/assets

Two towers: one of CLIP ViT-B/32's size with random weights and CLIP's own vocabulary, and the demo model's. For each,
four graphs and lengths take turns, each in its own process: padded through an export of fixed length (the baseline),
padded and unpadded through one of free length, and the dynamic int8 form of the latter unpadded and padded. Then the
names of 1000 things are embedded unpadded: all at once, a few at a time, and sorted by length. Raw samples go to
`results/text_length.json`, the table to `results/text_length.md`.
"""

from __future__ import annotations

import gzip
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import msgspec
import numpy as np

import edgevlm
from benchmarks.suite.running import rounded_samples
from edgevlm.export import Exported, export_graph
from edgevlm.ingest import read_model
from edgevlm.measure.environment import describe_environment
from edgevlm.measure.interleave import compare
from edgevlm.measure.protocol import ALL_STAY
from edgevlm.measure.spec import Comparison, Environment, Subject
from edgevlm.model import Model
from edgevlm.plan import TEXT_ENCODER
from edgevlm.proof import relative_error
from edgevlm.quantization.graphs import schemes_of_graph
from edgevlm.quantization.post_training import prepare, quantize
from edgevlm.report.notation import count
from edgevlm.runtime.backends import Session, load_backend
from edgevlm.runtime.spec import Array, SessionOptions, Spec, TextProcessing, from_json
from edgevlm.runtime.tasks.zero_shot_image_classification import unit_rows
from edgevlm.runtime.text import embed_texts, load_tokenizer, tokenize
from edgevlm.steps.inputs import save_inputs

RESULTS = Path(__file__).parent / "results"
FIXED, PADDED, OWN = "fp32 padded, fixed length", "fp32 padded, free length", "fp32 own length"
INT8_PADDED, INT8_OWN = "int8-dynamic padded", "int8-dynamic own length"
N_TOKENS = 8
COLOURS = ("red", "green", "blue", "yellow")
N_ROUNDS = 3  # of the whole list of names, in turns
N_PADDED = 96  # of the names, to compare with: padded, a thousand take minutes
PROTOCOL = msgspec.structs.replace(ALL_STAY, budget_s=60.0)


class Likeness(Spec, frozen=True, kw_only=True):
    """How near the embeddings of ``a`` are to those of ``b``, over the sentences.

    ``max_relative_error`` is the largest |difference| over the largest |value| of ``b``.
    """

    a: str
    b: str
    min_cosine: float
    max_relative_error: float


class Names(Spec, frozen=True, kw_only=True):
    """Embedding many names: seconds of each round, by way, and how many sentences have which number of tokens.

    ``max_relative_error`` is from the first ``N_PADDED`` of them padded.
    """

    n: int
    n_threads: int
    lengths: dict[int, int]
    samples_s: dict[str, tuple[float, ...]]
    max_relative_error: float


class Row(Spec, frozen=True, kw_only=True):
    tower: str
    max_length: int
    sentences: tuple[str, ...]
    exports: tuple[Exported, ...]
    likenesses: tuple[Likeness, ...]
    comparisons: dict[int, Comparison]
    names: Names | None


class Result(Spec, frozen=True, kw_only=True):
    """``comparisons`` are by number of threads."""

    schema_version: int
    command: str
    made_at: str
    environment: Environment
    rows: tuple[Row, ...]


@click.command()
@click.option(
    "--assets", type=click.Path(path_type=Path, exists=True), default=Path("../shared/assets"), show_default=True
)
@click.option("--threads", type=int, multiple=True, default=(1, 2), show_default=True)
def main(assets: Path, threads: tuple[int, ...]) -> None:
    """Export and measure; takes about ten minutes on two cores."""
    with tempfile.TemporaryDirectory(prefix="edgevlm-benchmark-") as folder:
        clip = read_model(str(write_clip(Path(folder) / "clip", assets)))
        names = from_json((assets / "models/detic-clip-text-embeddings/lvis_v1_names.json").read_bytes(), list[_Name])
        rows = (
            _row("demo", read_model("demo"), "a photo of a {} circle", Path(folder) / "a", threads, ()),
            _row(
                "CLIP ViT-B/32 (random weights)",
                clip,
                "a photo of a {} cat",
                Path(folder) / "b",
                threads,
                tuple(each.name.replace("_", " ") for each in names[:1000]),
            ),
        )
    result = Result(
        schema_version=1,
        command="python -m benchmarks.text_length",
        made_at=time.strftime("%Y-%m-%d", time.gmtime()),
        environment=describe_environment(),
        rows=rows,
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "text_length.json").write_bytes(msgspec.json.encode(result) + b"\n")
    (RESULTS / "text_length.md").write_text(table(result), encoding="utf-8")
    click.echo(table(result))


class _Name(msgspec.Struct):
    name: str


def write_clip(folder: Path, assets: Path) -> Path:
    """A checkpoint whose text tower has the size of CLIP ViT-B/32's; its image tower, which stays behind, is tiny."""
    import torch
    import transformers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    with gzip.open(assets / "models/clip-bpe/bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as opened:
        merges = [tuple(line.split()) for line in opened.read().split("\n")[1 : 49152 - 256 - 2 + 1]]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges).save_pretrained(folder)
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    torch.manual_seed(0)
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    config = transformers.CLIPConfig(
        projection_dim=512,
        vision_config={**tiny, "image_size": 32, "patch_size": 32},
        text_config={"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407},
    )
    model = transformers.CLIPModel(config)
    with torch.no_grad():  # a fresh CLIP's weights are so small that a wrong graph might pass
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.kaiming_normal_(parameter)
    model.save_pretrained(folder)
    return folder


def _row(
    tower: str, model: Model, template: str, folder: Path, threads: tuple[int, ...], names: tuple[str, ...]
) -> Row:
    click.echo(tower)
    padded = model.processing.text
    assert padded is not None
    own = msgspec.structs.replace(padded, padding="longest")
    sentences = tuple(template.replace("{}", colour) for colour in COLOURS)
    feeds = {text.padding: _feeds(model, sentences, text) for text in (padded, own)}
    n_tokens = feeds["longest"]["input_ids"].shape[1]
    if n_tokens != N_TOKENS:
        raise click.ClickException(f"'{sentences[0]}' has {n_tokens} tokens, not {N_TOKENS}.")
    free = export_graph(model, TEXT_ENCODER, batch=None, out=folder / "free", samples=feeds["max_length"])
    fixed = export_graph(_fixed(model), TEXT_ENCODER, batch=None, out=folder / "fixed", samples=feeds["max_length"])
    if not free.proof.lengths:
        raise click.ClickException(f"The length of {tower} is not free: {' '.join(free.notes)}")
    float_file, int8_file = folder / "free" / free.file, _int8(folder / "free" / free.file)
    ways = {
        FIXED: (folder / "fixed" / fixed.file, "max_length"),
        PADDED: (float_file, "max_length"),
        OWN: (float_file, "longest"),
        INT8_PADDED: (int8_file, "max_length"),
        INT8_OWN: (int8_file, "longest"),
    }
    embeddings = {
        way: np.concatenate([_embed(session, _first(feeds[padding], i)) for i in range(len(sentences))])
        for way, (file, padding) in ways.items()
        for session in [_open(file, threads[0])]
    }
    pairs = ((OWN, PADDED), (OWN, FIXED), (INT8_OWN, INT8_PADDED), (INT8_OWN, OWN), (INT8_PADDED, PADDED))
    return Row(
        tower=tower,
        max_length=padded.max_length,
        sentences=sentences,
        exports=(fixed, free),
        likenesses=tuple(_likeness(a, b, embeddings) for a, b in pairs),
        comparisons={n: rounded_samples(_compare(ways, feeds, n, folder)) for n in threads},
        names=_time_names(model, names, float_file, threads[-1]) if names else None,
    )


def _feeds(model: Model, sentences: tuple[str, ...], text: TextProcessing) -> dict[str, Array]:
    return tokenize(sentences, load_tokenizer(Path(model.tokenizer_file), text), text)


def _first(feeds: Mapping[str, Array], i: int) -> dict[str, Array]:
    return {name: value[i : i + 1] for name, value in feeds.items()}


def _fixed(model: Model) -> Model:
    """The model without its family's claim."""
    text = model.processing.text
    assert text is not None
    *others, tower = model.graphs
    inputs = tuple(msgspec.structs.replace(spec, shape=("batch", text.max_length)) for spec in tower.inputs)
    return msgspec.structs.replace(model, graphs=(*others, msgspec.structs.replace(tower, inputs=inputs)))


def _int8(graph: Path) -> Path:
    prepared, made = graph.with_name("prepared.onnx"), graph.with_name("int8.onnx")
    prepare(graph, prepared)
    schemes = schemes_of_graph(prepared, activation_sign="u8", methods=("minmax",))
    (scheme,) = (each for each in schemes if each.method == "dynamic")
    quantize(prepared, scheme, ranges=None, out=made)
    return made


def _open(file: Path, n_threads: int) -> Session:
    return load_backend("onnxruntime").open(file, SessionOptions(n_threads=n_threads))


def _embed(session: Session, feeds: Mapping[str, Array]) -> Array:
    return session.run(feeds)["text_embeds"]


def _likeness(a: str, b: str, embeddings: Mapping[str, Array]) -> Likeness:
    cosines = (unit_rows(embeddings[a]) * unit_rows(embeddings[b])).sum(axis=1)
    return Likeness(
        a=a,
        b=b,
        min_cosine=float(cosines.min()),
        max_relative_error=relative_error(embeddings[a], embeddings[b]),
    )


def _compare(
    ways: Mapping[str, tuple[Path, str]], feeds: Mapping[str, Mapping[str, Array]], n_threads: int, folder: Path
) -> Comparison:
    inputs = {name: save_inputs(folder / f"{name}.npz", _first(value, 0)) for name, value in feeds.items()}
    subjects = [
        Subject(
            name=way,
            backend="onnxruntime",
            file=str(file),
            inputs=str(inputs[padding]),
            session=SessionOptions(n_threads=n_threads),
        )
        for way, (file, padding) in ways.items()
    ]
    return compare(subjects, baseline=FIXED, protocol=PROTOCOL)


def _time_names(model: Model, names: tuple[str, ...], graph: Path, n_threads: int) -> Names:
    """In this process, the ways in turns; each way must give the same vectors."""
    text = model.processing.text
    assert text is not None
    own = msgspec.structs.replace(text, padding="longest")
    texts = [text.prompt_template.replace("{}", name) for name in names]
    tokenizers = {each.padding: load_tokenizer(Path(model.tokenizer_file), each) for each in (text, own)}
    session = _open(graph, n_threads)

    def embed(feeds: Mapping[str, Array]) -> Array:
        return _embed(session, feeds)

    def in_order() -> Array:
        parts = [texts[start : start + 32] for start in range(0, len(texts), 32)]
        return np.concatenate([embed(tokenize(part, tokenizers["longest"], own)) for part in parts])

    ways: dict[str, Callable[[], Array]] = {
        "own length, all at once": lambda: embed(tokenize(texts, tokenizers["longest"], own)),
        "own length, 32 at a time": in_order,
        "own length, 32 at a time, sorted": lambda: embed_texts(texts, tokenizers["longest"], own, embed),
    }
    samples: dict[str, list[float]] = {way: [] for way in ways}
    rows: dict[str, Array] = {}
    for _ in range(N_ROUNDS):
        for way, run in ways.items():
            started = time.perf_counter()
            rows[way] = run()
            samples[way].append(time.perf_counter() - started)
    padded = embed_texts(texts[:N_PADDED], tokenizers["max_length"], text, embed)
    lengths = [sum(encoding.attention_mask) for encoding in tokenizers["max_length"].encode_batch(texts)]
    return Names(
        n=len(names),
        n_threads=n_threads,
        lengths={length: lengths.count(length) for length in sorted(set(lengths))},
        samples_s={way: tuple(each) for way, each in samples.items()},
        max_relative_error=max(relative_error(each[:N_PADDED], padded) for each in rows.values()),
    )


def table(result: Result) -> str:
    lines = ["| tower | threads | what runs | p50 ms | × fixed length | 95 % interval |", "|---|---|---|---|---|---|"]
    for row in result.rows:
        for n_threads, comparison in row.comparisons.items():
            for measurement in comparison.measurements:
                cells = (row.tower, n_threads, measurement.subject, f"{measurement.percentile_ms(50):.2f}")
                lines.append(f"| {' | '.join(map(str, cells))} | {_speed(comparison, measurement.subject)} |")
    lines += [
        "",
        "| tower | embeddings | against | smallest cosine | largest relative error |",
        "|---|---|---|---|---|",
    ]
    for row in result.rows:
        for each in row.likenesses:
            cells = (row.tower, each.a, each.b, f"{each.min_cosine:.6f}", f"{each.max_relative_error:.1e}")
            lines.append(f"| {' | '.join(cells)} |")
    for row in result.rows:
        if row.names is None:
            continue
        lines += ["", f"| {row.names.n} names, {count(row.names.n_threads, 'thread')} | median s |", "|---|---|"]
        lines += [f"| {way} | {np.median(samples):.2f} |" for way, samples in row.names.samples_s.items()]
    tools = ", ".join(f"{k} {v}" for k, v in result.environment.tools.items() if k != "edgevlm")
    lines += [
        "",
        f"{result.environment.machine}, {result.made_at}, edgevlm {edgevlm.__version__}, {tools}. Sentences of "
        f"{N_TOKENS} tokens, one in a call. Made by `{result.command}`; raw samples in the JSON file beside this one.",
    ]
    return "\n".join(lines) + "\n"


def _speed(comparison: Comparison, subject: str) -> str:
    ratio = comparison.ratio(subject)
    if ratio is None:
        return "1 | –"
    doubt = "" if ratio.is_valid else " (not valid)"
    return f"{1 / ratio.value:.2f} | {1 / ratio.high:.2f} to {1 / ratio.low:.2f}{doubt}"


if __name__ == "__main__":
    main()
