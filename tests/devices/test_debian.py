"""Where packages come from, and what is said where they cannot be had; no network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgevlm.devices import debian
from edgevlm.errors import MissingToolError

TARGETS = """\
nodistro main https://elsewhere.example/node
trixie-updates main http://mirror.invalid/a/
trixie contrib http://mirror.invalid/a/
trixie main http://mirror.invalid/a/
bookworm main http://old.invalid/a/
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a made-up program in front of the system's, or hides all of them."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv(debian.MIRROR_VARIABLE, raising=False)

    def make(name: str, body: str) -> None:
        (folder / name).write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
        (folder / name).chmod(0o755)

    return make


def test_the_mirror_is_the_one_that_apt_takes_debian_from():
    assert debian.mirror_in(TARGETS) == "http://mirror.invalid/a/"


def test_security_updates_and_other_archives_are_no_mirror_of_debian():
    assert debian.mirror_in("\n".join(TARGETS.splitlines()[:3])) is None


def test_the_user_may_name_a_mirror_where_there_is_no_apt(tools, monkeypatch):
    monkeypatch.setenv(debian.MIRROR_VARIABLE, "http://mine.invalid/a")
    assert debian.debian_mirror() == "http://mine.invalid/a"


def test_without_a_mirror_the_user_is_told_how_to_name_one(tools):
    tools("apt-get", "print('nodistro main https://elsewhere.example/node')")
    with pytest.raises(MissingToolError, match=r"unavailable: this machine's apt has no mirror") as caught:
        debian.debian_mirror()
    assert debian.MIRROR_VARIABLE in caught.value.hint


def test_without_apt_the_emulator_is_unavailable(tools):
    with pytest.raises(MissingToolError, match=r"unavailable: apt-get is not installed\."):
        debian.debian_mirror()


def test_without_a_network_apt_is_quoted(tools, tmp_path, monkeypatch):
    monkeypatch.setenv(debian.MIRROR_VARIABLE, "http://mine.invalid/a")
    tools("apt-get", "print('W: one\\nE: Could not resolve mine.example', file=sys.stderr); sys.exit(100)")
    with pytest.raises(MissingToolError) as caught:
        debian.Suite("trixie", architectures=("arm64", "amd64"), root=tmp_path / "apt")
    assert "apt-get update of Debian's trixie failed (E: Could not resolve mine.example)" in caught.value.message
    assert debian.MIRROR_VARIABLE in caught.value.hint


def test_apt_is_told_to_trust_nothing_that_is_not_signed(tools, tmp_path, monkeypatch):
    monkeypatch.setenv(debian.MIRROR_VARIABLE, "http://mine.invalid/a")
    tools("apt-get", "")
    debian.Suite("trixie", architectures=("arm64", "amd64"), root=tmp_path / "apt")
    written = (tmp_path / "apt/apt.conf").read_text() + (tmp_path / "apt/sources/suite.sources").read_text()
    assert 'AllowInsecureRepositories "false"' in written and 'AllowUnauthenticated "false"' in written
    assert "trusted" not in written.lower()
    assert "URIs: http://mine.invalid/a\nSuites: trixie\n" in written
    assert 'APT::Architecture "arm64"' in written and "Architectures: arm64 amd64" in written


def test_a_package_that_cannot_be_unpacked_is_named(tools, tmp_path, monkeypatch):
    monkeypatch.setenv(debian.MIRROR_VARIABLE, "http://mine.invalid/a")
    tools("apt-get", "")
    tools("dpkg-deb", "sys.exit(2)")
    tools("tar", "print('tar: short', file=sys.stderr); sys.exit(2)")
    suite = debian.Suite("trixie", architectures=("arm64",), root=tmp_path / "apt")
    (tmp_path / "apt/cache/archives/one_1_arm64.deb").touch()
    with pytest.raises(MissingToolError, match=r"'one_1_arm64.deb' cannot be unpacked \(tar: short\)"):
        suite.unpack(tmp_path)
