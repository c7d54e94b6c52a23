"""A larger model's answers in the loss of quantization-aware training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs PyTorch")
pytest.importorskip("accelerate", reason="training needs accelerate")

from accelerate import Accelerator  # noqa: E402 - torch first
from torch.nn import functional  # noqa: E402

from edgevlm.data.readers import read_data_set  # noqa: E402
from edgevlm.errors import UsageError  # noqa: E402
from edgevlm.ingest import read_model  # noqa: E402
from edgevlm.progress import silent  # noqa: E402
from edgevlm.quantization import qat  # noqa: E402
from edgevlm.quantization.fine_tuning import Training  # noqa: E402
from edgevlm.quantization.teaching import Lesson, Texts, of_teacher  # noqa: E402
from edgevlm.quantization.training import Loss  # noqa: E402
from edgevlm.runtime.image import decode_image, preprocess  # noqa: E402
from tests.quantization.tiny_qat import LABELS, write_pictures  # noqa: E402

STUDENT = "tests.quantization.tiny_qat:make"
TEACHER = "tests.quantization.tiny_qat:make_teacher"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "colours")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "cache"))


def lesson(pictures: Path, teacher: str, size: tuple[int, ...] = (3,)) -> tuple[Lesson, Any]:
    student = read_model(STUDENT)
    data = read_data_set(pictures, labels=LABELS, task=student.task)
    found = of_teacher(
        teacher, student, data, LABELS, size=size, accelerator=Accelerator(cpu=True), progress=silent
    )  # fmt: skip
    return found, data


def test_answers_are_the_teachers_own_picture_by_picture(pictures: Path) -> None:
    found, data = lesson(pictures, TEACHER)
    from edgevlm.families.loading import load_module

    teacher = read_model(TEACHER)
    rows = [7, 2, 80]
    pixels = np.stack([preprocess(decode_image(data.samples[i].read()), teacher.processing.image) for i in rows])
    with torch.no_grad():
        expected = load_module(teacher)(torch.from_numpy(pixels))
    torch.testing.assert_close(found.answers(rows, torch.zeros(3)), expected, atol=5e-3, rtol=2e-3)
    assert found.digest == teacher.source.digest and found.texts is None


def test_a_teacher_of_other_answers_is_refused(pictures: Path) -> None:
    with pytest.raises(UsageError, match=r"answers with \[3\] values a picture, and '.*' with \[5\]"):
        lesson(pictures, TEACHER, size=(5,))
    with pytest.raises(UsageError, match="image-classification"):
        student = read_model("demo")
        data = read_data_set("shapes", labels=(), task=student.task, n_shapes=8)
        of_teacher(TEACHER, student, data, (), size=(64,), accelerator=Accelerator(cpu=True), progress=silent)


def test_each_is_scored_by_its_own_texts() -> None:
    torch.manual_seed(0)
    mine, theirs = (
        Texts(embeddings=functional.normalize(torch.randn(3, d), dim=-1), scale=scale, bias=0.0)
        for d, scale in ((4, 10.0), (6, 30.0))
    )
    got, expected, labels = torch.randn(5, 4), torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    training = Training(distill_share=1.0)
    loss, _ = Loss(training, texts=mine, their_texts=theirs, is_classifier=False)(got, expected, labels)
    p = torch.softmax(30 * functional.normalize(expected, dim=-1) @ theirs.embeddings.T, 1)
    q = torch.softmax(10 * functional.normalize(got, dim=-1) @ mine.embeddings.T, 1)
    torch.testing.assert_close(loss, (p * (p / q).log()).sum(1).mean())


def test_a_student_learns_from_its_teacher_in_int8(pictures: Path, tmp_path: Path) -> None:
    made = qat.quantize_model(
        STUDENT,
        qat=True,
        data=pictures,
        teacher=TEACHER,
        output=tmp_path / "out",
        is_bundled=False,
        training=Training(n_steps=4, batch_size=8, learning_rate=1e-3, distill_share=1.0),
    )
    assert made.quantization.proof.holds
    assert made.quantization.teacher == read_model(TEACHER).name != read_model(STUDENT).name
