"""A teacher that is asked much answers in ONNX Runtime, and as the module does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the teacher is a PyTorch module")

from edgevlm.data.readers import read_data_set  # noqa: E402 - torch first
from edgevlm.distillation import exported_teacher, teacher_outputs  # noqa: E402
from edgevlm.distillation.exported_teacher import quick_outputs  # noqa: E402
from edgevlm.distillation.pictures import TrainingPictures  # noqa: E402
from edgevlm.distillation.teacher_outputs import compute_outputs, describe_outputs  # noqa: E402
from edgevlm.distillation.teachers import TorchTeacher  # noqa: E402
from edgevlm.errors import ModelError  # noqa: E402
from edgevlm.ingest import read_model  # noqa: E402
from edgevlm.progress import Note  # noqa: E402
from tests.quantization.tiny_qat import LABELS, write_pictures  # noqa: E402

LOGITS = frozenset({"logits"})


@pytest.fixture(scope="module")
def teacher() -> TorchTeacher:
    return TorchTeacher(read_model("tests.quantization.tiny_qat:make"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> TrainingPictures:
    folder = write_pictures(tmp_path_factory.mktemp("pictures") / "colours", 12)
    data = read_data_set(folder, labels=LABELS, task="image-classification")
    return TrainingPictures(data, augmentation="none", seed=0, n_variants=1)


def ask(teacher: TorchTeacher, pictures: TrainingPictures, names: frozenset[str], n_rows: int) -> tuple[Any, Any, Any]:
    said: list[Any] = []
    pixels = pictures.pixels(range(9), teacher.processing.image)
    with quick_outputs(teacher, pictures, names, n_rows=n_rows, progress=said.append) as outputs:
        return outputs, outputs(pixels, names), said


def test_it_answers_as_the_module_does(teacher: TorchTeacher, pictures: TrainingPictures) -> None:
    outputs, found, _ = ask(teacher, pictures, LOGITS, 100_000)
    assert outputs != teacher.outputs and found.keys() == LOGITS
    expected = teacher.outputs(pictures.pixels(range(9), teacher.processing.image), LOGITS)["logits"]
    np.testing.assert_allclose(found["logits"], expected, atol=1e-5, rtol=1e-5)


def test_a_few_pictures_are_not_worth_an_export(teacher: TorchTeacher, pictures: TrainingPictures) -> None:
    assert ask(teacher, pictures, LOGITS, 12)[0] == teacher.outputs


def test_what_no_graph_gives_the_module_gives(teacher: TorchTeacher, pictures: TrainingPictures) -> None:
    assert ask(teacher, pictures, frozenset({"logits", "image_features"}), 100_000)[0] == teacher.outputs


def test_where_it_cannot_be_exported_that_is_said(
    teacher: TorchTeacher, pictures: TrainingPictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ModelError("An operator has no ONNX form.")

    monkeypatch.setattr(exported_teacher, "export_graph", refuse)
    outputs, _, said = ask(teacher, pictures, LOGITS, 100_000)
    assert outputs == teacher.outputs
    assert any(isinstance(event, Note) and "answers in PyTorch" in event.text for event in said)


def test_a_run_that_goes_on_takes_the_same_way(
    teacher: TorchTeacher, pictures: TrainingPictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is left to do: else the last rows would differ in their last bits."""
    asked: list[int] = []

    def count(*arguments: Any, n_rows: int, **options: Any) -> Any:
        asked.append(n_rows)
        return quick_outputs(*arguments, n_rows=n_rows, **options)

    monkeypatch.setattr(teacher_outputs, "quick_outputs", count)
    write, written = teacher_outputs._write_shard, []

    def stop_at_the_third(file: Path, tensors: Any) -> None:
        written.append(file)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(file, tensors)

    of = describe_outputs(teacher, pictures, LOGITS)
    monkeypatch.setattr(teacher_outputs, "_write_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        compute_outputs(teacher, pictures, of, tmp_path / "out", rows_in_shard=4)
    compute_outputs(teacher, pictures, of, tmp_path / "out", rows_in_shard=4)
    assert asked == [pictures.n_rows] * 2 and len(written) == 4, "of three shards two were there"
