"""A bundle of OpenVINO's graphs is whole, says what it needs, and is refused in a sentence where that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgevlm
from edgevlm.data import shapes
from edgevlm.errors import MissingToolError
from edgevlm.measure.protocol import QUICK

pytest.importorskip("openvino", reason="openvino is not installed")

VERSION = "edgevlm.runtime.backends.openvino.OpenVino.version"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openvino")
    shapes.write_folder(folder / "pictures", n=60, seed=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEVLM_CACHE", str(folder / "cache"))
        return edgevlm.compile(
            "demo",
            eval_data=folder / "pictures",
            backends=("openvino",),
            precision="fp32",
            search_minutes=0,
            protocol=QUICK,
            output=folder / "bundle",
        )


@pytest.mark.slow
def test_the_bundle_holds_both_files_and_answers_as_it_did(compiled):
    (component,) = compiled.manifest.components
    assert component.backend == "openvino"
    assert component.files == ("components/image_encoder.xml", "components/image_encoder.bin")
    assert all((Path(compiled.bundle) / file).is_file() for file in component.files)
    assert compiled.manifest.golden.tolerance == 1e-4
    assert edgevlm.verify(compiled.bundle)
    assert {"openvino", "nncf"} & compiled.manifest.provenance.tools.keys()
    assert "pkg:pypi/openvino@" in (Path(compiled.bundle) / "sbom.cdx.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "words", "hint"),
    [(None, "not installed", "edgevlm[openvino]"), ("2025.1.0", "2025.1.0 is installed", "openvino>=")],
)
def test_the_bundle_is_refused_without_its_backend(version, words, hint, compiled, monkeypatch):
    least = compiled.manifest.requires.backends
    assert list(least) == ["openvino"] and least["openvino"].count(".") == 1
    monkeypatch.setattr(VERSION, lambda self: version)
    with pytest.raises(MissingToolError, match=words) as caught:
        edgevlm.Pipeline.load(compiled.bundle)
    assert hint in caught.value.hint
