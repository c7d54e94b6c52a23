from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgevlm.runtime.bundle import open_bundle
from edgevlm.runtime.verify import golden_conditions, relative_error, verify_bundle
from tests.runtime import tiny
from tests.runtime.test_bundle import edit


@pytest.mark.parametrize(
    "task",
    [
        "image-classification",
        "image-feature-extraction",
        "zero-shot-image-classification/folded",
        "zero-shot-image-classification/both towers",
    ],
)
@pytest.mark.parametrize("suffix", ["", ".evlm"])
def test_a_bundle_verifies_where_it_was_made(tmp_path: Path, task: str, suffix: str):
    found = verify_bundle(tiny.make_bundle(tmp_path / f"bundle{suffix}", task))
    assert found
    assert found.is_same_machine
    assert "every bit equal" in found.to_text()
    assert "as where it was made" in found.to_text()
    assert [case.is_bit_equal and case.is_same_answer and case.max_error == 0 for case in found.cases] == [True, True]


def rewrite(bundle: Path, path: str, data: bytes) -> None:
    """Change a file and the manifest with it, as a careless tool or another machine would."""
    import hashlib

    (bundle / path).write_bytes(data)

    def change(manifest: dict) -> None:
        entry = next(e for e in manifest["files"] if e["path"] == path)
        entry |= {"n_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    edit(bundle, change)


def test_the_smallest_difference_counts_where_the_vectors_were_made(bundle: Path):
    expected = np.load(bundle / "golden/0.logits.npy")
    rewrite(bundle, "golden/0.logits.npy", tiny.npy(np.nextafter(expected, np.float32(9))))
    found = verify_bundle(bundle)
    assert not found
    assert "other bits" in found.reasons[0]
    assert 0 < found.cases[0].max_error < 1e-6


def test_a_small_difference_is_fine_on_another_machine_and_a_large_one_is_not(bundle: Path):
    edit(bundle, lambda m: m["golden"]["made_on"].update(cpu="another"))
    expected = np.load(bundle / "golden/0.logits.npy")
    rewrite(bundle, "golden/0.logits.npy", tiny.npy(expected * np.float32(1 + 5e-5)))
    found = verify_bundle(bundle)
    assert found
    assert not found.is_same_machine
    assert "within the tolerance" in found.to_text()
    assert not found.cases[0].is_bit_equal
    rewrite(bundle, "golden/0.logits.npy", tiny.npy(expected * np.float32(1.001)))
    found = verify_bundle(bundle)
    assert not found
    assert "off by 0.001" in found.reasons[0]


def test_another_answer_is_told(bundle: Path):
    edit(bundle, lambda m: m["golden"]["made_on"].update(cpu="another"))
    answer = json.loads((bundle / "golden/0.json").read_bytes())
    answer["classes"][0]["index"] = 99
    rewrite(bundle, "golden/0.json", json.dumps(answer).encode())
    found = verify_bundle(bundle)
    assert not found
    assert "another answer" in found.reasons[0]
    assert found.reasons[0] in found.to_text()


def test_changed_labels_are_told(bundle: Path):
    edit(bundle, lambda m: m.update(labels=["rouge", "vert", "bleu"]))
    assert not verify_bundle(bundle)


def test_a_bundle_without_golden_vectors_is_not_verified(bundle: Path):
    edit(bundle, lambda m: m["golden"].update(cases=[]))
    found = verify_bundle(bundle)
    assert not found
    assert "no golden vectors" in found.reasons[0]


def test_the_conditions_name_processor_threads_and_versions(bundle: Path):
    conditions = golden_conditions(open_bundle(bundle).manifest.components)
    assert {"cpu", "arch", "isa", "n_threads", "numpy", "pillow", "onnxruntime"} == conditions.keys()
    assert conditions["n_threads"] == "model=1"


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [2.0, -4.0], 0.25),
        ([0.0], [0.5], 0.5),
        ([1.0], [np.nan], np.inf),
        ([1.0], [1.0, 2.0], np.inf),
    ],
)
def test_errors_are_relative_to_the_largest_value(expected: list[float], actual: list[float], error: float):
    assert relative_error(np.array(expected), np.array(actual)) == error
