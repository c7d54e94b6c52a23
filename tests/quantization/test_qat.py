"""Quantization-aware training: goes on where it stopped, exports what it trained, and says so where it does not."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs PyTorch")
pytest.importorskip("accelerate", reason="training needs accelerate")

import msgspec  # noqa: E402 - torch first
from accelerate import Accelerator  # noqa: E402

from edgevlm.cli.main import exit_code_of  # noqa: E402
from edgevlm.data.data_set import DataSet  # noqa: E402
from edgevlm.data.readers import read_data_set  # noqa: E402
from edgevlm.data.splits import hold_out  # noqa: E402
from edgevlm.errors import GateError, MissingToolError  # noqa: E402
from edgevlm.export import graph_of, open_source, traced_program  # noqa: E402
from edgevlm.ingest import read_model  # noqa: E402
from edgevlm.model import Model  # noqa: E402
from edgevlm.progress import Event, StepProgress, silent  # noqa: E402
from edgevlm.quantization import proving, qat  # noqa: E402
from edgevlm.quantization.fake_graph import FakeQuantized, fake_quantized, plain_module  # noqa: E402
from edgevlm.quantization.fine_tuning import Training  # noqa: E402
from edgevlm.quantization.placement import Placement, read_placement  # noqa: E402
from edgevlm.quantization.schemes import Scheme  # noqa: E402
from edgevlm.quantization.teaching import of_program  # noqa: E402
from edgevlm.quantization.training import batch_of, rate_at, train  # noqa: E402
from tests.quantization.tiny_qat import LABELS, write_pictures  # noqa: E402

FACTORY = "tests.quantization.tiny_qat:make"
TRAINING = Training(n_steps=9, batch_size=8, learning_rate=1e-3, checkpoint_every=2, observe_share=0.6, adapt_share=0.5)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "colours")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """What a training starts from."""

    model: Model
    train_on: DataSet
    held_out: DataSet
    program: Any
    file: Path
    ranges: Path
    placement: Placement
    scheme: Scheme

    def student(self, *, n_bits: int = 8) -> FakeQuantized:
        graph = graph_of(self.model, "model")
        return fake_quantized(self.program, graph, self.placement, self.scheme, prepared=self.file, n_bits=n_bits)


@pytest.fixture(scope="module")
def start(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    folder = tmp_path_factory.mktemp("start")
    model = read_model(FACTORY)
    data = read_data_set(pictures, labels=LABELS, task=model.task)
    train_on, held_out = hold_out(data, share=0.3)
    samples = qat._samples(model, train_on, 5)
    file = qat._float_graph(model, "model", samples, folder / "float", silent)
    scheme = qat._scheme(file, "cpu", None, is_per_channel=False)
    ranges = qat._ranges(model, train_on, file, scheme, folder, silent)
    quantized = folder / "model.onnx"
    qat.quantize_graph(file, scheme, ranges=ranges, out=quantized)
    return Start(
        model=model,
        train_on=train_on,
        held_out=held_out,
        program=traced_program(model, "model", samples),
        file=file,
        ranges=ranges,
        placement=read_placement(file, quantized, scheme),
        scheme=scheme,
    )


def fine_tune(start: Start, folder: Path, *, stop_after: int | None = None) -> dict[str, Any]:
    """Everything that was trained; ``stop_after`` stops as Ctrl-C would."""
    student = start.student(n_bits=4)

    def say(event: Event) -> None:
        if stop_after is not None and isinstance(event, StepProgress) and f"step {stop_after}/" in event.detail:
            raise KeyboardInterrupt

    train(
        student,
        of_program(plain_module(start.program)),
        start.train_on,
        start.model.processing.image,
        TRAINING,
        texts=None,
        is_classifier=True,
        folder=folder,
        identity="same",
        accelerator=Accelerator(cpu=True),
        progress=say,
    )
    return {name: value.clone() for name, value in student.module.state_dict().items()}


def test_a_training_that_was_stopped_ends_with_the_same_bits(start: Start, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    expected = fine_tune(start, whole)
    for stop_after in (5, 8):
        with pytest.raises(KeyboardInterrupt):
            fine_tune(start, parts, stop_after=stop_after)
    got = fine_tune(start, parts)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    rows = [json.loads(line) for line in (parts / "training.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(TRAINING.n_steps))
    untrained = start.student(n_bits=4).module.state_dict()
    assert any(not torch.equal(untrained[name], value) for name, value in expected.items())


def test_a_checkpoint_of_another_training_is_left_alone(start: Start, tmp_path: Path) -> None:
    from edgevlm.quantization.training import Checkpoint

    fine_tune(start, tmp_path)
    module = start.student().module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert Checkpoint(tmp_path, "another", module, torch.optim.AdamW(module.parameters())).load() == 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_every_picture_comes_once_before_any_comes_again() -> None:
    training = Training(batch_size=8, n_steps=100)
    seen = [i for step in range(5) for i in batch_of(step, 20, training)]
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20))
    assert seen[:20] != seen[20:]
    assert batch_of(3, 20, training) == batch_of(3, 20, training)
    assert len(batch_of(0, 3, training)) == 8


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    training = Training(n_steps=100, learning_rate=1.0)
    rates = [rate_at(step, training) for step in range(100)]
    assert rates[0] < rates[4] and max(rates) == rates[4] > 0.99 and rates[-1] < 1e-3


@pytest.fixture(scope="module")
def exported(start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[FakeQuantized, Path]:
    """A student and its graph, as ONNX Runtime's quantizer writes it with the student's scales."""
    student = start.student(n_bits=5)
    file = tmp_path_factory.mktemp("exported") / "model.onnx"
    qat.quantize_graph(start.file, start.scheme, ranges=start.ranges, out=file, overrides=student.overrides())
    return student, file


def prove(start: Start, student: FakeQuantized, file: Path, folder: Path) -> proving.Equality:
    judge = proving.Judge(start.model, LABELS, start.held_out, folder, "model")
    reference = judge.evaluate(open_source(start.model, "model"), None, silent, "float")
    return proving.prove_exported(judge, student, proving.open_graph(file), reference)[0]


def test_the_exported_graph_is_the_program(start: Start, exported: tuple[FakeQuantized, Path], tmp_path: Path) -> None:
    proof = prove(start, *exported, tmp_path)
    assert proof.holds and proof.agreement == 1 and proof.max_relative_error < 1e-5


@pytest.mark.parametrize("tampered", ["scale", "weight"])
def test_the_proof_fails_for_a_graph_that_is_another(
    start: Start, exported: tuple[FakeQuantized, Path], tmp_path: Path, tampered: str
) -> None:
    student, file = exported
    other = tamper(file, tmp_path / "model.onnx", tampered)
    assert not prove(start, student, other, tmp_path).holds


def tamper(file: Path, out: Path, what: str) -> Path:
    """The classifier's weights, or their scale, turned round."""
    import onnx

    model = onnx.load(file)
    name = "head.weight_quantized" if what == "weight" else "head.weight_scale"
    tensor = next(each for each in model.graph.initializer if each.name.endswith(name))
    tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, out)
    return out


def test_learned_scales_are_what_the_graph_holds(start: Start, exported: tuple[FakeQuantized, Path]) -> None:
    import onnx

    student, file = exported
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(file).graph.initializer}
    overrides = student.overrides()
    assert len(overrides) > 8
    for name, each in overrides.items():
        np.testing.assert_array_equal(constants[f"{name}_scale"], np.float32([one["scale"] for one in each]).squeeze())
    weights = [value for name, value in constants.items() if name.endswith("weight_quantized")]
    assert weights and all(np.abs(value.astype(int)).max() == 15 for value in weights)


def test_where_the_export_is_not_what_was_trained_nothing_is_written(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = qat.quantize_graph

    def quantize_badly(prepared: Path, scheme: Scheme, *, out: Path, **options: Any) -> Any:
        made = quantize(prepared, scheme, out=out, **options)
        if out.parent.name == qat.QUANTIZED_FOLDER:
            tamper(out, out, "weight")
        return made

    monkeypatch.setattr(qat, "quantize_graph", quantize_badly)
    with pytest.raises(GateError, match="does not answer as the trained model") as caught:
        qat.quantize_model(
            FACTORY, qat=True, data=pictures, output=tmp_path / "out", is_bundled=False, training=TRAINING
        )
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_from_the_command_line_to_a_bundle(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgevlm.runtime.pipeline import Pipeline

    out = tmp_path / "tiny-qat"
    arguments = ["quantize", FACTORY, "--qat", "--data", str(pictures), "--steps", "6", "--batch-size", "8",
                 "--weight-bits", "4", "--max-drop", "1", "--json", "-q", "-o", str(out)]  # fmt: skip
    assert exit_code_of(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    found = msgspec.json.decode((out / qat.QUANTIZATION_FILE).read_bytes(), type=qat.Quantization)
    assert found.proof.holds and found.weights.startswith("4 bits (15 levels")
    assert told["quantization"]["ranges_sha256"] == found.ranges_sha256
    assert {row["name"] for row in told["report"]["candidates"]} >= {"fp32", "ready-made"}
    assert (out / "model.safetensors").is_file() and (out / "quantized" / "model.onnx").is_file()
    assert len((out / "training.jsonl").read_text().splitlines()) == 6
    answer = Pipeline.load(out / "bundle")(next(pictures.rglob("*.png")))
    assert answer.classes[0].label in LABELS
    assert not list(tmp_path.glob(".*"))
    assert exit_code_of(arguments) == 2  # it is there already


# --- what a user can get wrong ----------------------------------------------------------------------------


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    def run(*arguments: str) -> tuple[int, str]:
        code = exit_code_of(["quantize", *arguments])
        return code, capsys.readouterr().err

    yield run


def test_without_qat_compile_is_named(told: Any) -> None:
    code, message = told("demo")
    assert code == 2 and "edgevlm compile" in message


def test_an_onnx_file_has_nothing_to_train(told: Any, pictures: Path, tmp_path: Path) -> None:
    from tests.colours import write_classifier

    file = write_classifier(tmp_path / "net.onnx")
    code, message = told(str(file), "--qat", "--data", str(pictures))
    assert code == 2 and "is an ONNX file" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--qat",), "nothing to train on"),
        (("--qat", "--data", "shapes", "--weights", "per-chanel"), "Did you mean 'per-channel'"),
        (("--qat", "--data", "shapes", "--weight-bits", "9"), "Ask for 2 to 8"),
    ],
)
def test_what_cannot_be_asked_for(told: Any, arguments: tuple[str, ...], words: str) -> None:
    code, message = told(FACTORY, *arguments)
    assert code == 2 and words in message


def test_too_few_pictures_are_an_error(told: Any, tmp_path: Path) -> None:
    code, message = told(FACTORY, "--qat", "--data", str(write_pictures(tmp_path / "few", 30)))
    assert code == 1 and "would be held out" in message


def test_without_accelerate_the_extra_is_named(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "accelerate" else find(name))
    with pytest.raises(MissingToolError, match="needs accelerate"):
        qat.quantize_model(FACTORY, qat=True, data=pictures)


def test_pictures_that_are_judged_on_are_not_trained_on(pictures: Path, tmp_path: Path) -> None:
    both = tmp_path / "some"
    for label in LABELS:
        (both / label).mkdir(parents=True)
        for file in sorted((pictures / label).iterdir())[:8]:
            shutil.copyfile(file, both / label / file.name)
    train_on, held_out = qat._read_data(read_model(FACTORY), LABELS, pictures, both)
    assert (len(train_on), len(held_out)) == (66, 24)
    assert not {s.digest for s in train_on.samples} & {s.digest for s in held_out.samples}
