from __future__ import annotations

import io
import os
import stat
import zipfile
from pathlib import Path

import pytest

from edgevlm.errors import BundleError, StoreError
from edgevlm.runtime.bundle import open_bundle
from edgevlm.runtime.cache import cache_root
from edgevlm.runtime.verify import verify_bundle
from tests.runtime import tiny


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tiny.make_bundle(tmp_path / "bundle.evlm")


def members(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def pack(archive: Path, contents: dict[str, bytes], *, kind: int = zipfile.ZIP_STORED, **attributes: int) -> Path:
    with zipfile.ZipFile(archive, "w", kind) as opened:
        for name, data in contents.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = kind
            info.external_attr = attributes.get(name.replace("/", "_").replace(".", "_"), 0o644 << 16)
            opened.writestr(info, data)
    return archive


def refused(archive: Path) -> str:
    with pytest.raises(BundleError) as raised:
        open_bundle(archive)
    assert raised.value.hint
    assert not list((cache_root() / "bundles").glob("*")), "nothing is left of what was refused"
    return raised.value.message


def test_an_archive_unpacks_once(archive: Path):
    assert verify_bundle(archive)
    (home,) = (cache_root() / "bundles").iterdir()
    before = (home / "manifest.json").stat().st_mtime_ns
    assert verify_bundle(archive)
    assert (home / "manifest.json").stat().st_mtime_ns == before


def test_a_damaged_cache_is_unpacked_anew(archive: Path):
    home = open_bundle(archive).root
    (home / "components/model.onnx").write_bytes(b"short")
    assert verify_bundle(archive)


def test_a_changed_file_in_the_cache_says_what_to_delete(archive: Path):
    graph = open_bundle(archive).root / "components/model.onnx"
    graph.write_bytes(bytes(len(graph.read_bytes())))
    with pytest.raises(BundleError, match="was changed") as raised:
        verify_bundle(archive)
    assert str(graph.parents[1]) in raised.value.hint


@pytest.mark.parametrize("kind", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_other_compressions_are_refused(kind: int, archive: Path, tmp_path: Path):
    other = pack(tmp_path / "packed.zip", members(archive), kind=kind)
    with pytest.raises(BundleError, match="not compressed by deflate"):
        open_bundle(other)


def test_a_compressed_archive_opens_too(archive: Path, tmp_path: Path):
    other = pack(tmp_path / "packed.zip", members(archive), kind=zipfile.ZIP_DEFLATED)
    assert verify_bundle(other)


@pytest.mark.parametrize("cut", [0, 1, 30, 500, -30, -1])
def test_a_truncated_archive_is_refused_by_name(archive: Path, cut: int):
    archive.write_bytes(archive.read_bytes()[:cut])
    assert "bundle.evlm" in refused(archive)


def test_each_member_spoilt_in_turn_is_refused(archive: Path):
    contents = members(archive)
    for name, data in contents.items():
        if name != "manifest.json":
            pack(archive, {**contents, name: bytes([data[0] ^ 1]) + data[1:]})
            assert name in refused(archive)
            pack(archive, {**contents, name: data[:-1]})
            assert name in refused(archive)
        pack(archive, {other: rest for other, rest in contents.items() if other != name})
        assert name in refused(archive)


def test_a_flipped_byte_is_found(archive: Path):
    data = archive.read_bytes()
    at = data.index(members(archive)["components/model.onnx"]) + 50
    archive.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    refused(archive)


@pytest.mark.parametrize(
    "name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:\\evil.txt", "evil.py"]
)
def test_a_member_that_leads_out_is_refused(archive: Path, tmp_path: Path, name: str):
    pack(archive, {**members(archive), name: b"x"})
    assert "is not listed" in refused(archive)
    assert not list(tmp_path.rglob("evil*"))


def test_a_link_in_an_archive_is_refused(archive: Path):
    contents = {**members(archive), "link.txt": b"/etc/passwd"}
    pack(archive, contents, link_txt=(stat.S_IFLNK | 0o777) << 16)
    assert "link.txt" in refused(archive)


def test_a_member_twice_is_refused(archive: Path):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("components/model.onnx", b"x")
    assert "there twice" in refused(archive)


def test_a_bomb_is_refused_before_it_is_unpacked(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("edgevlm.runtime.archive._FREE_GROWTH_BYTES", 0)
    pack(archive, {"manifest.json": members(archive)["manifest.json"]})
    from edgevlm.bundle.write import write_bundle
    from tests.runtime.tiny import parts

    manifest, files = parts("image-classification")
    write_bundle(tmp_path / "big", manifest, {**files, "zeros.bin": bytes(1 << 20)})
    folder = tmp_path / "big"
    contents = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    pack(archive, contents, kind=zipfile.ZIP_DEFLATED)
    assert "would grow" in refused(archive)


def test_a_member_that_lies_about_its_size_is_refused(archive: Path):
    """The central directory says what the manifest says, but more comes out."""
    contents = members(archive)
    name = "LICENSE"
    longer = {**contents, name: contents[name] + b"!" * 50}
    pack(archive, longer)
    data = archive.read_bytes()
    honest, lie = (len(longer[name])).to_bytes(4, "little"), len(contents[name]).to_bytes(4, "little")
    directory = data.rindex(b"PK\x01\x02", 0, data.rindex(name.encode()))
    archive.write_bytes(data[:directory] + data[directory:].replace(honest + honest, honest + lie, 1))
    refused(archive)


def test_what_is_no_archive_is_refused(tmp_path: Path):
    (tmp_path / "a.evlm").write_bytes(b"hello")
    assert "a.evlm" in refused(tmp_path / "a.evlm")
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    (tmp_path / "b.evlm").write_bytes(empty.getvalue())
    assert "no manifest.json" in refused(tmp_path / "b.evlm")


def test_a_packed_folder_says_so(archive: Path):
    pack(archive, {f"bundle/{name}": data for name, data in members(archive).items()})
    assert "no manifest.json at its top" in refused(archive)


def test_a_cache_that_cannot_be_written_is_said_so(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(StoreError) as raised:
        open_bundle(archive)
    assert "EDGEVLM_CACHE" in raised.value.hint


def test_a_full_disk_leaves_nothing(archive: Path, monkeypatch: pytest.MonkeyPatch):
    def full(target: Path, data: bytes) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match="no space left"):
        open_bundle(archive)
    assert not list((cache_root() / "bundles").iterdir())
