"""A bundle's bill of materials: CycloneDX 1.6, JSON. https://cyclonedx.org/docs/1.6/json/"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any

from edgevlm.runtime.spec import Manifest

# The namespace of our serial numbers; any fixed one makes the same contents give the same number.
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://cyclonedx.org/schema/bom-1.6#edgevlm")


def bill_of_materials(manifest: Manifest, *, runtime_packages: Mapping[str, str]) -> bytes:
    """What the bundle was made of: the model, its licence and weights, the tools, and what runs it.

    The same bundle always gives the same bytes: no time, and a serial number that follows from the contents.

    Args:
        manifest: need not list its files yet.
        runtime_packages: versions of what a device installs, by PyPI name.
    """
    provenance = manifest.provenance
    model: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": manifest.name,
        "hashes": [{"alg": "SHA-256", "content": provenance.weights_sha256}],
        "modelCard": {"modelParameters": {"task": manifest.task}},
        "properties": [{"name": "edgevlm:source", "value": provenance.source}],
    }
    if provenance.revision is not None:
        model["version"] = provenance.revision
    if provenance.licence is not None:
        model["licenses"] = [_licence(provenance.licence)]
    graphs = [
        {
            "type": "machine-learning-model",
            "bom-ref": f"graph:{component.name}",
            "name": component.name,
            "properties": [
                {"name": "edgevlm:file", "value": component.file},
                {"name": "edgevlm:precision", "value": component.precision},
                {"name": "edgevlm:backend", "value": component.backend},
            ],
            "pedigree": {"ancestors": [{"type": "machine-learning-model", "name": manifest.name}]},
        }
        for component in manifest.components
    ]
    packages = [_package(name, version, role="runtime") for name, version in sorted(runtime_packages.items())]
    tools = sorted(provenance.tools.items())
    root = {"type": "machine-learning-model", "bom-ref": "bundle", "name": f"{manifest.name} for {manifest.target}"}
    document: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": root,
            "tools": {"components": [_package(name, version, role="tool") for name, version in tools]},
        },
        "components": [model, *graphs, *packages],
        "dependencies": [
            {"ref": "bundle", "dependsOn": [graph["bom-ref"] for graph in graphs]},
            *({"ref": graph["bom-ref"], "dependsOn": ["model"]} for graph in graphs),
        ],
    }
    content = hashlib.sha256(_to_json(document)).hexdigest()
    return _to_json({**document, "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, content)}"})


def _package(name: str, version: str, *, role: str) -> dict[str, Any]:
    purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{version}"
    return {"type": "library", "bom-ref": f"{role}:{name}", "name": name, "version": version, "purl": purl}


def _licence(words: str) -> dict[str, Any]:
    """An SPDX expression where it is one, else the words."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    try:
        return {"expression": str(canonicalize_license_expression(words))}
    except InvalidLicenseExpression:
        return {"license": {"name": words}}


def _to_json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
