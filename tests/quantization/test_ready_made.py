"""Ready-made graphs compete where they fit, and are named where they do not."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from edgevlm.compiler import prepare
from edgevlm.errors import ModelError, UsageError
from edgevlm.ingest import read_model
from edgevlm.lowering.ready_made import check_fits, find_ready_made
from tests.colours import write_classifier, write_pictures


def test_graphs_are_found_by_name(tmp_path: Path) -> None:
    model = read_model(str(write_classifier(tmp_path / "net.onnx")))
    folder = tmp_path / "quantized"
    with pytest.raises(UsageError, match="holds no quantized graph"):
        find_ready_made(folder, model)
    folder.mkdir()
    write_classifier(folder / "modell.onnx")
    with pytest.raises(UsageError, match="called after no graph") as caught:
        find_ready_made(folder, model)
    assert "Did you mean 'model'" in caught.value.hint
    (folder / "modell.onnx").rename(folder / "model.onnx")
    assert find_ready_made(folder, model) == {"model": (folder / "model.onnx").resolve()}


def test_a_graph_fits_only_with_the_same_inputs_and_outputs(tmp_path: Path) -> None:
    file = write_classifier(tmp_path / "net.onnx")
    check_fits(file, write_classifier(tmp_path / "same.onnx", weight=2))
    model = onnx.load(file)
    model.graph.output[0].name = "logits"
    for node in model.graph.node:
        node.output[:] = ["logits" if name == "scores" else name for name in node.output]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ModelError, match=r"'other.onnx' gives 'logits' .*, where the float graph gives 'scores'"):
        check_fits(tmp_path / "other.onnx", file)
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(ModelError, match="is not an ONNX graph"):
        check_fits(tmp_path / "text.onnx", file)


def test_what_competes_is_part_of_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "cache"))
    file = write_classifier(tmp_path / "net.onnx")
    pictures = write_pictures(tmp_path / "pictures")
    folder = tmp_path / "quantized"
    folder.mkdir()
    digests = []
    for weight in (1.0, 2.0):
        write_classifier(folder / "model.onnx", weight=weight)
        job = prepare(str(file), eval_data=pictures, quantized=folder, output=tmp_path / "out")
        search = next(step for step in job.steps if step.name == "search")
        digests.append(search.params["ready_made"]["model"])
        assert f"--quantized {folder}" in job.command
    assert digests[0] != digests[1]
    plain = prepare(str(file), eval_data=pictures, output=tmp_path / "out")
    assert all("ready_made" not in step.params for step in plain.steps)
