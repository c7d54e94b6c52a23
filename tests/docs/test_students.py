"""What docs/students.md says of sizes is what is counted."""

from __future__ import annotations

import pytest

from benchmarks.students import BEGIN, END, PAGE, count_classifier, table
from edgevlm.distillation.students import STUDENTS, load_student
from edgevlm.distillation.students.tower import TowerStudent


def rows() -> dict[str, list[str]]:
    written = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in written.strip().splitlines()[2:]]
    return {first: rest for first, *rest in cells}


def test_every_student_of_a_tower_has_a_row():
    assert list(rows()) == [name for name in STUDENTS if isinstance(load_student(name), TowerStudent)]


@pytest.mark.parametrize("name", ["mobilevit-xxs", "mobilevitv2-0.5"])
def test_a_row_is_what_is_counted(name: str):
    student = load_student(name)
    assert isinstance(student, TowerStudent)
    n_parameters, n_macs = count_classifier(student, 64)
    assert rows()[name][:2] == [f"{n_parameters / 1e6:.2f} M", f"{n_macs / 1e6:,.0f}"]


@pytest.mark.slow
def test_the_whole_table_is_what_is_counted():
    assert table() in PAGE.read_text(encoding="utf-8")
