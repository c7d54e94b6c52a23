from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.errors import BundleError
from edgevlm.runtime.bundle import check_path, read_manifest
from edgevlm.runtime.spec import Accuracy, FileEntry, Latency, Manifest, Provenance, Requires, from_json, to_json
from tests.runtime import tiny

# What JSON can hold: any text without lone surrogates, and finite numbers.
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
FLOAT = st.floats(allow_nan=False, allow_infinity=False)
COUNT = st.integers(0, 2**53)
JSON = st.recursive(
    st.none() | st.booleans() | COUNT | FLOAT | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=8,
)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


def entries() -> st.SearchStrategy[tuple[FileEntry, ...]]:
    name = st.from_regex(r"[a-z][a-z0-9_-]{0,8}(/[a-z][a-z0-9_-]{0,8}){0,2}\.(json|npy|png|txt)", fullmatch=True)
    digest = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
    entry = st.builds(FileEntry, path=name.filter(lambda p: p != "manifest.json"), sha256=digest, n_bytes=COUNT)
    return st.lists(entry, max_size=5, unique_by=lambda e: e.path).map(tuple)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """A manifest that keeps the rules, with everything in it that is free made up."""
    manifest, files = tiny.parts("image-classification")
    listed = tuple(FileEntry(path=path, sha256="0" * 64, n_bytes=len(data)) for path, data in files.items())
    numbers = dict.fromkeys(("value", "reference", "drop", "drop_low", "drop_high"), FLOAT)
    return msgspec.structs.replace(
        manifest,
        name=draw(TEXT),
        selection_reason=draw(TEXT),
        labels=tuple(draw(st.lists(TEXT, max_size=5))),
        accuracy=draw(optional(st.builds(Accuracy, metric=TEXT, data=TEXT, n=COUNT, **numbers))),
        latency=draw(
            optional(
                st.builds(
                    Latency,
                    p50_ms=FLOAT, p90_ms=FLOAT, p99_ms=FLOAT, n=COUNT, n_threads=COUNT, batch=COUNT, machine=TEXT,
                    ratio=optional(FLOAT), ratio_low=optional(FLOAT), ratio_high=optional(FLOAT),
                )
            )
        ),
        requires=draw(st.builds(Requires, arch=optional(TEXT), isa=st.lists(TEXT).map(tuple))),
        provenance=draw(
            st.builds(
                Provenance,
                source=TEXT, revision=optional(TEXT), weights_sha256=TEXT, licence=optional(TEXT),
                tools=st.dictionaries(TEXT, TEXT), recipe=st.dictionaries(TEXT, JSON),
            )
        ),
        files=listed + draw(entries()),
    )  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(manifests())
def test_a_manifest_and_its_text_are_inverses(manifest: Manifest):
    text = to_json(manifest)
    assert read_manifest(text) == manifest
    assert to_json(read_manifest(text)) == text


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_a_path_that_is_accepted_stays_inside(path: str):
    from pathlib import PurePosixPath, PureWindowsPath

    try:
        check_path(path)
    except BundleError:
        return
    for kind in (PurePosixPath, PureWindowsPath):
        joined = kind("/bundle") / path
        assert joined.parts[: len(kind("/bundle").parts)] == kind("/bundle").parts
        assert ".." not in joined.parts


def test_unknown_fields_are_errors():
    with pytest.raises(msgspec.ValidationError, match="extra"):
        from_json(b'{"path": "a", "sha256": "b", "n_bytes": 1, "extra": 2}', FileEntry)
