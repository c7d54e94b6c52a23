from __future__ import annotations

from pathlib import Path

import pytest

from edgevlm.distillation.students import load_student
from edgevlm.distillation.students.facts import STUDENT, TEACHER, count, describe_student
from edgevlm.families.loading import load_module
from edgevlm.ingest import read_model
from edgevlm.measure.protocol import QUICK
from tests.distillation.teachers import classifier
from tests.families.checkpoints import write_checkpoint
from tests.ingest.layouts import write_card, write_onnx


def test_counts_are_those_of_the_arithmetic(tmp_path: Path):
    """An image tower of 2 layers of width 16 over 16 patches and a class token, then a projection to 16."""
    tiny = read_model(str(write_checkpoint("CLIPModel", tmp_path / "clip")))
    module = load_module(tiny)
    facts = count(module, tiny)
    n, d = 17, 16
    layer = 4 * n * d * d + 2 * n * d * 2 * d + 2 * n * n * d
    patches = 16 * d * 3 * 8 * 8
    assert facts.graphs["image_encoder"].n_macs == patches + 2 * layer + d * 16
    assert facts.n_macs == sum(graph.n_macs for graph in facts.graphs.values())
    n_image = sum(p.numel() for p in module.vision_model.parameters()) + d * 16
    assert facts.graphs["image_encoder"].n_parameters == n_image
    # All that is left is the text tower's, but for the scale, which is in no graph.
    assert facts.n_parameters == n_image + facts.graphs["text_encoder"].n_parameters + 1
    assert not any(parameter.requires_grad for parameter in module.parameters()), "counting leaves no trace"


def test_a_student_is_timed_beside_its_teacher(tmp_path: Path):
    teacher = classifier(tmp_path / "teacher")
    found = describe_student(load_student("mobilevit-xxs"), teacher, image_size=64, protocol=QUICK)
    assert found.teacher is not None
    assert (found.student.name, found.student.height, found.teacher.height) == ("mobilevit-xxs", 64, 32)
    for who, facts in ((STUDENT, found.student), (TEACHER, found.teacher)):
        assert facts.latency_ms["model"] == found.comparisons["model"].measurement(who).percentile_ms(50) > 0
        assert facts.n_parameters == facts.graphs["model"].n_parameters
    assert found.student.n_parameters > found.teacher.n_parameters
    assert found.student.n_macs > found.teacher.n_macs


@pytest.mark.slow
def test_a_teacher_without_a_module_is_timed_and_not_counted(tmp_path: Path):
    file = write_onnx(tmp_path / "net.onnx")
    write_card(tmp_path / "net.card.toml")
    found = describe_student(load_student("mobilevit-xxs"), read_model(str(file)), image_size=64, protocol=QUICK)
    assert found.teacher is None
    assert found.comparisons["model"].has(TEACHER)
    assert set(found.student.latency_ms) == {"model"}
