"""Packages of a Debian suite, fetched and unpacked beside the system: no root, nothing installed, nothing registered.

apt-get does the work with lists and a cache of its own, so that what it checks anywhere (the suite's signature, each
package's hash) is checked here, and what it is told anywhere (proxies, passwords of mirrors) holds here.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from edgevlm.errors import MissingToolError

MIRROR_VARIABLE = "EDGEVLM_DEBIAN_MIRROR"

# What apt's sources call Debian's own archive; its security and update suites have a dash in their names.
_SUITES = frozenset({
    "bullseye", "bookworm", "trixie", "forky", "sid", "oldoldstable", "oldstable", "stable", "testing", "unstable",
})  # fmt: skip

# The package debian-archive-keyring puts the keys there (.pgp since trixie); without it apt asks its trusted ones.
_KEYRINGS = ("/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp")

# Read after the system's own configuration. The hooks there may clean the system's cache, which is not ours to do.
_CONFIGURATION = """\
#clear APT::Update;
#clear APT::Architectures;
#clear DPkg;
APT::Architecture "{first}";
APT::Architectures {{ {all} }};
APT::Install-Recommends "false";
APT::Sandbox::User "";
APT::Update::Error-Mode "any";
APT::Get::AllowUnauthenticated "false";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowWeakRepositories "false";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::Etc::SourceList "/dev/null";
Dir::Etc::SourceParts "{root}/sources";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "{root}/none";
Dir::State "{root}";
Dir::State::Lists "{root}/lists";
Dir::State::status "{root}/status";
Dir::Cache "{root}/cache";
Dir::Cache::Archives "{root}/cache/archives";
Debug::NoLocking "true";
"""


def unavailable(reason: str, hint: str) -> MissingToolError:
    return MissingToolError(f"The emulator is unavailable: {reason}.", hint=hint)


class Suite:
    """A suite's package lists, as apt keeps them under ``root``, which the caller removes when done.

    Args:    architectures: what packages may be for, the one that dependencies are resolved for first.
    Raises:  MissingToolError: there is no apt, no mirror, or the mirror does not answer.
    """

    def __init__(self, name: str, *, architectures: Sequence[str], root: Path) -> None:
        self.name = name
        self.root = root
        for folder in ("sources", "none", "lists/partial", "cache/archives/partial"):
            (root / folder).mkdir(parents=True)
        (root / "status").touch()
        (root / "sources" / "suite.sources").write_text(sources_text(debian_mirror(), name, architectures))
        (root / "apt.conf").write_text(
            _CONFIGURATION.format(
                first=architectures[0], all=" ".join(f'"{each}";' for each in architectures), root=root
            )
        )
        self._apt("update")

    def fetch(self, *packages: str) -> None:
        """Download packages, given as ``name:arch``, and all that they depend on."""
        self._apt("--yes", "--download-only", "install", *packages)

    def fetch_alone(self, package: str) -> None:
        """Download one package without what it depends on."""
        self._apt("download", package)

    def unpack(self, folder: Path, *, only: Iterable[str] = ()) -> None:
        """Unpack whatever was downloaded into ``folder``, then forget it.

        Args: only: the files or folders wanted, such as ``./usr/bin/qemu-aarch64``; all but documents unless told.
        """
        wanted = tuple(only)
        for package in sorted((self.root / "cache/archives").glob("*.deb")):
            _unpack(package, folder, wanted)
            package.unlink()

    def _apt(self, *arguments: str) -> None:
        command = ["apt-get", "-c", str(self.root / "apt.conf"), "-qq", *arguments]
        run_tool(
            command,
            what=f"apt-get {next(word for word in arguments if not word.startswith('-'))} of Debian's {self.name}",
            hint=f"Connect this machine to a mirror of Debian, or name one in {MIRROR_VARIABLE}.",
            cwd=self.root / "cache/archives",
        )


def sources_text(mirror: str, suite: str, architectures: Sequence[str]) -> str:
    """A file for apt's ``sources.list.d`` that names one suite, and the keys that must have signed it."""
    keyring = next((file for file in _KEYRINGS if Path(file).is_file()), None)
    lines = [
        "Types: deb",
        f"URIs: {mirror}",
        f"Suites: {suite}",
        "Components: main",
        f"Architectures: {' '.join(architectures)}",
        *([f"Signed-By: {keyring}"] if keyring else []),
    ]
    return "\n".join(lines) + "\n"


def debian_mirror() -> str:
    """The mirror that the user names, else the one that this machine's apt takes Debian itself from.

    Raises: MissingToolError: there is no apt, or it knows no mirror of Debian.
    """
    if asked := os.environ.get(MIRROR_VARIABLE):
        return asked
    found = run_tool(
        ["apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"],
        what="apt-get indextargets",
        hint="Mend this machine's package sources.",
    )
    mirror = mirror_in(found)
    if mirror is None:
        raise unavailable(
            "this machine's apt has no mirror of Debian", f"Name one in the environment variable {MIRROR_VARIABLE}."
        )
    return mirror


def mirror_in(targets: str) -> str | None:
    """The first of apt's targets, a line of suite, component and address each, that is Debian itself.

    Example:
        >>> mirror_in("stable-security main https://one/\\nstable main https://two/")
        'https://two/'
    """
    for line in targets.splitlines():
        suite, _, rest = line.partition(" ")
        component, _, address = rest.partition(" ")
        if suite in _SUITES and component == "main" and address:
            return address
    return None


def host_architecture() -> str:
    """This machine's, as Debian calls it: ``amd64``, ``arm64``, ..."""
    hint = "Emulate on Debian, or on a system with Debian's dpkg and apt."
    return run_tool(["dpkg", "--print-architecture"], what="dpkg", hint=hint).strip()


def run_tool(command: Sequence[str], *, what: str, hint: str, cwd: Path | None = None) -> str:
    """What a tool prints.

    Raises: MissingToolError: it is not installed, or it failed; with the first of its own words.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, "LC_ALL": "C"}
        )
    except FileNotFoundError as error:
        raise unavailable(f"{command[0]} is not installed", hint) from error
    if done.returncode != 0:
        raise unavailable(f"{what} failed ({_first_words(done.stderr or done.stdout)})", hint)
    return done.stdout


def _first_words(text: str) -> str:
    """The line that says what is wrong: tools begin it with E:, ERROR or the like, and warnings may stand before."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("e:", "err:", "error"))]
    return (errors or lines or ["it said nothing"])[0][:300].rstrip(".")


def _unpack(package: Path, folder: Path, only: tuple[str, ...]) -> None:
    without = ("./usr/share/doc", "./usr/share/man", "./usr/share/locale", "./usr/share/lintian")
    tar = ["tar", "--extract", "--directory", str(folder), "--no-same-owner", "--keep-directory-symlink"]
    hint = "Install Debian's dpkg and tar."
    try:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as source:
            chosen = only or tuple(f"--exclude={each}" for each in without)
            done = subprocess.run([*tar, *chosen], stdin=source.stdout, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise unavailable(f"{error.filename} is not installed", hint) from error
    if done.returncode != 0 or source.returncode not in (0, -13):  # tar may stop reading early: SIGPIPE
        raise unavailable(f"'{package.name}' cannot be unpacked ({_first_words(done.stderr)})", hint)
