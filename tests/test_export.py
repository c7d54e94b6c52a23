from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgevlm.export.from_torch as from_torch
import edgevlm.export.program as program_of
from edgevlm.errors import EdgeVLMError, ModelError, UsageError
from edgevlm.export import export_graph, open_source
from edgevlm.ingest import read_model
from edgevlm.model import Model
from edgevlm.progress import Event
from edgevlm.proof import first_difference, relative_error
from edgevlm.runtime.spec import Array
from tests.families.checkpoints import write_checkpoint
from tests.families.samples import samples_of
from tests.ingest.layouts import write_card, write_onnx

SOURCE = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 4, 3)
        self.second = torch.nn.Conv2d(4, 4, 3)
        self.third = torch.nn.Conv2d(4, 5, 3)

    def forward(self, pixel_values):
        return self.third(self.second(self.first(pixel_values).tanh()).tanh()).mean((2, 3))


class Odd(Net):
    def forward(self, pixel_values):
        return torch.special.i1(super().forward(pixel_values))


class Branching(Net):
    def forward(self, pixel_values):
        logits = super().forward(pixel_values)
        return logits + 1 if logits.sum() > 0 else logits


class Endless(Net):
    def forward(self, pixel_values):
        return super().forward(pixel_values) / 0


def net():
    return Net()


def odd():
    return Odd()


def branching():
    return Branching()


def endless():
    return Endless()
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "exportednets.py").write_text(SOURCE, encoding="utf-8")
    write_card(folder / "exportednets.card.toml", 'task = "image-classification"\n[input]\nheight = 12\nwidth = 12\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield


def pictures(n: int = 4, size: int = 12) -> dict[str, Array]:
    return {"pixel_values": np.random.default_rng(1).normal(size=(n, 3, size, size)).astype(np.float32)}


def refused(model: Model, out: Path, samples: dict[str, Array], **kwargs: Any) -> EdgeVLMError:
    with pytest.raises(EdgeVLMError) as caught:
        export_graph(model, "model", out=out, samples=samples, **{"batch": None, **kwargs})
    assert caught.value.hint
    assert list(out.glob("*")) == [], "nothing half-made stays behind"
    return caught.value


# --- from PyTorch -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("package")
def test_the_same_model_gives_the_same_bytes_and_no_path_of_this_machine(tmp_path: Path, capfd: pytest.CaptureFixture):
    model = read_model("exportednets:net")
    events: list[Event] = []
    made = export_graph(model, "model", batch=None, out=tmp_path / "a", samples=pictures(), progress=events.append)
    export_graph(model, "model", batch=None, out=tmp_path / "b", samples=pictures())
    graph = (tmp_path / "a" / made.file).read_bytes()
    assert graph == (tmp_path / "b" / made.file).read_bytes()
    for leak in (str(tmp_path), str(Path(from_torch.__file__).parent), "site-packages", 'File "', "exportednets"):
        assert leak.encode() not in graph
    assert made.proof.route == "torch.onnx.export(dynamo=True)"
    assert made.n_bytes == len(graph)
    assert made.proof.n_nodes > 3
    assert len(events) == 3
    assert capfd.readouterr() == ("", ""), "the exporter's chatter is not for users"


@pytest.mark.usefixtures("package")
def test_a_tampered_graph_is_found_and_the_node_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save = from_torch.save

    def tampering(program: Any, file: Path) -> None:
        import onnx_ir as ir

        weight = program.graph.initializers["module.second.weight"]
        (tampering.node,) = (node.name for node, _ in weight.uses())
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.01))
        save(program, file)

    monkeypatch.setattr(from_torch, "save", tampering)
    error = refused(read_model("exportednets:net"), tmp_path / "out", pictures())
    assert "is not equal to its source" in error.message
    assert f"they part at the node '{tampering.node}' (Conv)" in error.message


@pytest.mark.usefixtures("package")
def test_an_operator_without_onnx_form_is_named(tmp_path: Path):
    error = refused(read_model("exportednets:odd"), tmp_path / "out", pictures())
    assert "uses the operator 'prims.bessel_i1'" in error.message


@pytest.mark.usefixtures("package")
def test_what_cannot_be_traced_and_what_is_not_a_number(tmp_path: Path):
    assert "cannot be traced" in refused(read_model("exportednets:branching"), tmp_path / "out", pictures()).message
    endless = refused(read_model("exportednets:endless"), tmp_path / "out", pictures())
    assert "gives NaN or infinite values in 'logits'" in endless.message


@pytest.mark.usefixtures("package")
def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(program_of, "EXTERNAL_ABOVE_BYTES", 100)
    made = export_graph(read_model("exportednets:net"), "model", batch=2, out=tmp_path, samples=pictures())
    assert made.files == ("model.onnx", "model.onnx.data")
    assert made.n_bytes == sum((tmp_path / name).stat().st_size for name in made.files)


def test_transformers_own_exporter_is_the_second_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    model = read_model(str(write_checkpoint("ViTForImageClassification", tmp_path / "checkpoint")))
    plain = torch.onnx.export

    def refusing(asked: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(asked, torch.nn.Module):
            raise RuntimeError("not today")
        return plain(asked, *args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", refusing)
    samples = samples_of(model, model.graphs[0])
    made = export_graph(model, "model", batch=None, out=tmp_path / "out", samples=samples)
    assert made.proof.route == "transformers.exporters.OnnxExporter"
    assert made.proof.max_relative_error < 1e-5
    assert made.inputs[0].shape == ("batch", 3, 32, 32)


def test_an_interpolated_size_is_proven_too(tmp_path: Path):
    folder = write_checkpoint("ViTForImageClassification", tmp_path / "checkpoint")
    model = read_model(str(folder), image_size=48)
    made = export_graph(model, "model", batch=1, out=tmp_path / "out", samples=samples_of(model, model.graphs[0]))
    assert made.inputs[0].shape == (1, 3, 48, 48)


def test_weights_that_are_missing_or_no_numbers(tmp_path: Path):
    from safetensors.numpy import load_file, save_file

    folder = write_checkpoint("ViTForImageClassification", tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"][1, 2] = np.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"The weight 'classifier.weight' of .* holds 1 values that are NaN or infinite"
    ):
        open_source(read_model(str(folder)), "model")
    del weights["classifier.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 of the weights of ViTForImageClassification"):
        open_source(read_model(str(folder)), "model")


def test_a_pickle_gives_the_same_model(tmp_path: Path):
    import torch
    from safetensors.torch import load_file

    folder = write_checkpoint("ViTForImageClassification", tmp_path)
    model = read_model(str(folder))
    samples = samples_of(model, model.graphs[0])
    expected = open_source(model, "model").run(samples)["logits"]
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    pickled = read_model(str(folder), allow_pickle=True)
    assert np.array_equal(open_source(pickled, "model").run(samples)["logits"], expected)


def test_no_such_graph(tmp_path: Path):
    model = read_model(str(write_checkpoint("ViTForImageClassification", tmp_path)))
    with pytest.raises(UsageError, match="has no graph 'modle'"):
        open_source(model, "modle")


# --- from an ONNX file ------------------------------------------------------------------------------------


def onnx_model(folder: Path, card: str = 'task = "image-classification"', **kwargs: Any) -> Model:
    write_card(folder / "net.card.toml", card)
    return read_model(str(write_onnx(folder / "net.onnx", **kwargs)))


@pytest.mark.parametrize("of_file", ["n", 1, 2])
@pytest.mark.parametrize("asked", [None, 1, 2])
def test_a_file_gets_the_batch_that_is_asked_for(tmp_path: Path, of_file: int | str, asked: int | None):
    model = onnx_model(tmp_path, batch=of_file)
    made = export_graph(model, "model", batch=asked, out=tmp_path / "out", samples=pictures(5, 8))
    assert made.inputs[0].shape == (asked or "batch", 3, 8, 8)
    assert made.outputs[0].shape == (asked or "batch", 3)
    assert (made.inputs[0].name, made.outputs[0].name) == ("pixel_values", "logits")
    assert made.proof.max_relative_error == 0


def test_a_batch_that_is_baked_into_a_file(tmp_path: Path):
    model = onnx_model(tmp_path, batch=1, bakes_batch=True)
    export_graph(model, "model", batch=1, out=tmp_path / "one", samples=pictures(3, 8))
    error = refused(model, tmp_path / "out", pictures(3, 8))
    assert "is made for batch 1 and does not run at another" in error.message
    assert error.hint == "Pass --batch 1."


def test_any_tensor_of_a_file_can_be_an_output(tmp_path: Path):
    card = 'task = "image-classification"\n[outputs]\nlogits = "scores"\n'
    model = onnx_model(tmp_path, card, softmax=True, weight=3.0)
    samples = pictures(4, 8)
    made = export_graph(model, "model", batch=None, out=tmp_path / "out", samples=samples)
    assert made.proof.n_nodes == 3, "what comes after the output is left out"
    expected = 3 * samples["pixel_values"].mean((2, 3))
    assert np.allclose(open_source(model, "model").run(samples)["logits"], expected, atol=1e-5)


def test_names_of_the_task_may_be_taken_in_the_file(tmp_path: Path):
    import onnx

    card = 'task = "image-classification"\n[outputs]\nlogits = "scores"\n'
    model = onnx_model(tmp_path, card)
    proto = onnx.load(tmp_path / "net.onnx")
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = ["logits" if name == "flat" else name for name in names]
    onnx.save(proto, tmp_path / "net.onnx")
    made = export_graph(model, "model", batch=None, out=tmp_path / "out", samples=pictures(4, 8))
    assert made.proof.max_relative_error == 0


def test_old_opsets_are_brought_up(tmp_path: Path):
    made = export_graph(
        onnx_model(tmp_path, opset=11), "model", batch=1, out=tmp_path / "out", samples=pictures(2, 8), opset=17
    )
    assert made.opset == 17
    kept = export_graph(onnx_model(tmp_path, opset=15), "model", batch=1, out=tmp_path / "kept", samples=pictures(2, 8))
    assert kept.opset == 15


def test_a_file_with_nan_weights(tmp_path: Path):
    error = refused(onnx_model(tmp_path, weight=float("nan")), tmp_path / "out", pictures(2, 8))
    assert "The weight 'matrix'" in error.message


def test_a_file_that_onnx_runtime_cannot_run(tmp_path: Path):
    error = refused(onnx_model(tmp_path, op="Frobnicate", domain="acme"), tmp_path / "out", pictures(2, 8))
    assert isinstance(error, ModelError)
    assert "ONNX Runtime" in error.message
    assert "Frobnicate" in error.message


# --- comparing --------------------------------------------------------------------------------------------


def test_relative_error():
    one = np.array([1.0, -4.0], np.float32)
    assert relative_error(one, one) == 0
    assert relative_error(one + np.float32(0.5), one) == pytest.approx(0.125)
    assert relative_error(np.array([np.nan, -4.0]), one) == float("inf")
    assert relative_error(one[:1], one) == float("inf")
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
    assert relative_error(np.ones(2), np.zeros(2)) == 1
    assert relative_error(np.zeros((0, 2)), np.zeros((0, 2))) == 0


def test_the_first_difference_stands_in_the_graphs_order(tmp_path: Path):
    file = write_onnx(tmp_path / "net.onnx", size=8)
    feeds = {"image": pictures(1, 8)["pixel_values"]}
    pooled = feeds["image"].mean((2, 3), keepdims=True)
    right = {"pooled": pooled, "flat": pooled.reshape(1, 3), "scores": pooled.reshape(1, 3)}
    assert first_difference(file, feeds, right, tolerance=1e-4) is None
    assert first_difference(file, feeds, {"unknown": pooled}, tolerance=1e-4) is None
    wrong = first_difference(file, feeds, {**right, "scores": pooled.reshape(1, 3) * 2, "flat": pooled}, tolerance=1e-4)
    assert wrong is not None
    assert (wrong.node, wrong.operator) == ("flatten", "Reshape")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx"], "the probe is taken away"


# --- real models ------------------------------------------------------------------------------------------


def asset_pictures(folder: Path, model: Model, n: int) -> dict[str, Array]:
    from edgevlm.runtime.image import decode_image, preprocess

    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))[:n]
    image = model.processing.image
    return {image.input_name: np.stack([preprocess(decode_image(file), image) for file in files])}


@pytest.mark.assets
@pytest.mark.slow
def test_mobilenet_gives_pytorchs_answers(assets: Path, tmp_path: Path):
    from edgevlm.runtime.backends import load_backend
    from edgevlm.runtime.spec import SessionOptions

    model = read_model(str(assets / "models" / "mobilenet-v2-imagenet"))
    images = asset_pictures(assets / "data" / "imagenet-sample" / "images", model, 16)
    made = export_graph(model, "model", batch=None, out=tmp_path, samples=images)
    assert made.proof.max_relative_error < 1e-5
    got = load_backend("onnxruntime").open(tmp_path / made.file, SessionOptions()).run(images)["logits"]
    expected = open_source(model, "model").run(images)["logits"]
    assert np.array_equal(got.argmax(1), expected.argmax(1))
    # The pictures are those of classes 0, 2, 4, ...; on all 500 the model is right for 89 %.
    assert (got.argmax(1) == np.arange(0, 32, 2)).mean() > 0.7


@pytest.mark.assets
def test_resnet56_stays_what_it_is(assets: Path, tmp_path: Path):
    card = write_card(
        tmp_path / "resnet56.toml",
        """
        task = "image-classification"
        labels = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        [input]
        mean = [0.485, 0.456, 0.406]
        std = [0.229, 0.224, 0.225]
        """,
    )
    model = read_model(str(assets / "models" / "resnet56-cifar10.onnx"), card=card)
    images = asset_pictures(assets / "data" / "cifar10-sample" / "images", model, 50)
    made = export_graph(model, "model", batch=None, out=tmp_path / "out", samples=images)
    assert made.proof.max_relative_error == 0
    assert made.proof.n_inputs == 50
    logits = open_source(model, "model").run(images)["logits"]
    assert (logits.argmax(1) == 0).mean() > 0.7, "the first 50 pictures are airplanes"


def test_a_tokenizer_that_cuts_otherwise_than_transformers_is_refused(tmp_path: Path):
    import json

    import transformers

    folder = write_checkpoint("CLIPModel", tmp_path / "clip")
    letters = [letter + end for letter in "acdefhilnoptx" for end in ("", "</w>")]
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    model = read_model(str(folder))
    samples = samples_of(model, model.graphs[1])
    assert export_graph(model, "text_encoder", batch=None, out=tmp_path, samples=samples).proof.n_inputs == 4
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "normalizer": None}))
    with pytest.raises(ModelError, match=r"cuts 'A Photo,  of a CAT!' into other tokens than Transformers' CLIPTok"):
        export_graph(model, "text_encoder", batch=None, out=tmp_path, samples=samples)
