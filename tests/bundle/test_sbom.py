from __future__ import annotations

import json
import re

import msgspec
import pytest

from edgevlm.bundle.sbom import bill_of_materials
from tests.runtime import tiny

PACKAGES = {"onnxruntime": "1.32.0", "numpy": "2.4.0"}


def bill(**changes: object) -> dict:
    manifest, _ = tiny.parts("image-classification")
    provenance = msgspec.structs.replace(manifest.provenance, **changes)
    return json.loads(
        bill_of_materials(msgspec.structs.replace(manifest, provenance=provenance), runtime_packages=PACKAGES)
    )


def test_it_names_model_licence_weights_tools_and_packages():
    document = bill(weights_sha256="ab" * 32, revision="abc123")
    assert (document["bomFormat"], document["specVersion"], document["version"]) == ("CycloneDX", "1.6", 1)
    model = next(each for each in document["components"] if each["bom-ref"] == "model")
    assert model["type"] == "machine-learning-model"
    assert model["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    assert model["version"] == "abc123"
    assert model["licenses"] == [{"expression": "Apache-2.0"}]
    purls = {each["purl"] for each in document["components"] if each["type"] == "library"}
    assert purls == {"pkg:pypi/onnxruntime@1.32.0", "pkg:pypi/numpy@2.4.0"}
    assert [tool["name"] for tool in document["metadata"]["tools"]["components"]] == ["onnx"]


def test_references_are_unique_and_resolve():
    document = bill(tools={"onnxruntime": "1.32.0", "torch": "2.13.0"})
    parts = [document["metadata"]["component"], *document["metadata"]["tools"]["components"], *document["components"]]
    references = [part["bom-ref"] for part in parts]
    assert len(references) == len(set(references))
    for edge in document["dependencies"]:
        assert {edge["ref"], *edge["dependsOn"]} <= set(references)


def test_the_same_bundle_gives_the_same_bytes_and_another_a_different_number():
    assert bill() == bill()
    assert bill()["serialNumber"] != bill(source="elsewhere")["serialNumber"]
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", bill()["serialNumber"])
    assert "timestamp" not in json.dumps(bill())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mit", [{"expression": "MIT"}]),
        ("MIT OR apache-2.0", [{"expression": "MIT OR Apache-2.0"}]),
        ("Some licence of our own", [{"license": {"name": "Some licence of our own"}}]),
    ],
)
def test_licences_are_spdx_where_they_can_be(words: str, expected: list):
    document = bill(licence=words)
    assert document["components"][0]["licenses"] == expected


def test_no_licence_is_left_out():
    assert "licenses" not in bill(licence=None)["components"][0]
