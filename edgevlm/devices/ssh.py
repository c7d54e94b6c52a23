"""A device reached over SSH: ``ssh://user@host:port``, with the system's own OpenSSH client.

That client brings the user's keys, agent and configuration (aliases, ProxyJump). One connection lasts as long as the
block; every request is a session over it, in which ``edgevlm.devices.far_side`` runs. edgevlm and the bundle are
pushed once and found again by their hash.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qsl, urlsplit

from edgevlm.devices import far_side
from edgevlm.devices.errors import error_from
from edgevlm.devices.trees import Tree, bundle_tree, runtime_tree
from edgevlm.errors import (
    DataError,
    EdgeVLMError,
    GateError,
    MissingToolError,
    StoreError,
    UsageError,
    did_you_mean,
)
from edgevlm.progress import Note, Progress, StepFinished, StepProgress, StepStarted, silent
from edgevlm.runtime.bundle import open_bundle, release
from edgevlm.runtime.machine import normal_arch

# pyproject.toml's `requires-python` and `dependencies`; tests/devices/test_ssh.py holds them against it.
LEAST_PYTHON = "3.10"
# Module -> what to install, and at least which version.
BASE_LIBRARIES = {
    "click": ("click", "8.2"),
    "msgspec": ("msgspec", "0.19"),
    "numpy": ("numpy", "1.26"),
    "onnxruntime": ("onnxruntime", "1.20"),
    "PIL": ("pillow", "10.3"),
    "tokenizers": ("tokenizers", "0.20"),
}
# What Python has itself from 3.11 on.
LIBRARIES_OF_3_10 = {"tomli": ("tomli", "2.0")}

_CONNECT_TIMEOUT_S = 15
# Until the first answer: a key may want a touch or a confirmation.
_GREETING_TIMEOUT_S = 120.0
_SIGN_OF_LIFE_S = 15.0
_END_TIMEOUT_S = far_side.GRACE_S + 5.0
_CHUNK_BYTES = 1 << 18

_OPTIONS = (
    "BatchMode=yes", "StrictHostKeyChecking=yes", f"ConnectTimeout={_CONNECT_TIMEOUT_S}",
    "ServerAliveInterval=10", "ServerAliveCountMax=3", "ControlPersist=no",
    "ForwardAgent=no", "ForwardX11=no", "ClearAllForwardings=yes", "PermitLocalCommand=no",
    "RemoteCommand=none", "RequestTTY=no", "LogLevel=ERROR",
)  # fmt: skip

# Old Pythons must be able to say how old they are.
_GREET = 'import sys;sys.stdout.write("{nonce} %d.%d.%d\\n" % sys.version_info[:3]);sys.stdout.flush();sys.stdin.read()'
# A json.py in the user's home folder must not be taken for Python's.
_FAR_SIDE = (
    "import sys;sys.path[:]=filter(None,sys.path);import json;r=json.loads(sys.stdin.buffer.readline().decode());"
    'g=dict(__name__="far_side");exec(r["source"],g);g["main"](r["request"])'
)

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a device is.

    Args:
        python: its interpreter.
        config: a configuration file for ssh instead of the user's own; empty for that.
    """

    host: str
    user: str = ""
    port: int | None = None
    python: str = "python3"
    config: str = ""

    @property
    def name(self) -> str:
        """For people: the address without its options."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = f":{self.port}" if self.port else ""
        return f"{self.user}@{host}{port}" if self.user else host + port

    @property
    def login(self) -> str:
        """What a user types to get there."""
        config = f"-F {shlex.quote(self.config_file)} " if self.config else ""
        port = f"-p {self.port} " if self.port else ""
        return f"ssh {config}{port}{self.user + '@' if self.user else ''}{self.host}"

    @property
    def config_file(self) -> str:
        return str(Path(self.config).expanduser())


def parse_address(text: str) -> Address:
    """``ssh://[user@]host[:port][?python=/path/to/python3][&config=/path/to/ssh_config]``.

    Raises: UsageError: it is something else.
    """
    form = "Write ssh://user@host:port, with ?python=/path/to/python3 where that is not its python3."
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
        asked = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError as error:
        raise UsageError(f"'{text}' is no address of a device: {error}.", hint=form) from None
    if parts.password is not None:
        raise UsageError("A device's address holds no password.", hint="Log in with a key: ssh-copy-id sets one up.")
    # A host that begins with a dash would be an option of ssh.
    is_plain = re.fullmatch(r"[\w][\w.:%-]*", host) and re.fullmatch(r"(?:[\w][\w.+-]*)?", parts.username or "")
    if parts.scheme != "ssh" or not is_plain or parts.path not in ("", "/") or parts.fragment:
        raise UsageError(f"'{text}' is no address of a device.", hint=form)
    if unknown := asked.keys() - {"python", "config"}:
        name = min(unknown)
        raise UsageError(f"'{text}' asks for '{name}'.", hint=did_you_mean(name, ("python", "config")))
    if not all(asked.values()) or any(not value.isprintable() for value in asked.values()):
        raise UsageError(f"'{text}' has an option without a plain value.", hint=form)
    # urlsplit makes the host lower case; an alias of ssh's configuration may be in upper case.
    spelt = re.search(re.escape(host), parts.netloc.rpartition("@")[2], re.IGNORECASE)
    return Address(host=spelt.group() if spelt else host, user=parts.username or "", port=port, **asked)


@contextmanager
def open_ssh(address: str, progress: Progress = silent) -> Iterator[SshDevice]:
    """The device at ``address``, connected, its Python and libraries checked.

    Raises: UsageError: that is no address. MissingToolError: there is no ssh here, the device cannot be reached or
        does not let us in, or it lacks Python or a library.
    """
    where = parse_address(address)
    if shutil.which("ssh") is None:
        raise MissingToolError("A device is reached with ssh, which is not installed.", hint="Install OpenSSH.")
    with _connected(where) as connection:
        yield SshDevice(connection, progress)


class SshDevice:
    """A device that is connected; see ``edgevlm.devices.Device``."""

    is_emulated = False

    def __init__(self, connection: _Connection, progress: Progress) -> None:
        self._connection = connection
        self._progress = progress
        libraries = BASE_LIBRARIES if connection.python >= (3, 11) else BASE_LIBRARIES | LIBRARIES_OF_3_10
        self._facts = connection.ask({"what": "look", "libraries": {m: d for m, (d, _) in libraries.items()}})
        self._check_libraries(libraries)
        self._runtime = runtime_tree()

    @property
    def name(self) -> str:
        return self._connection.address.name

    def run(self, verb: str, bundle: Path, options: Sequence[str | Path] = (), *, output: Path | None = None) -> bytes:
        """What ``edgevlm verb BUNDLE OPTIONS --json`` prints there; a ``Path`` in the options is one more bundle.

        A verb that says that something is wrong and prints a result all the same, as ``verify`` does, has not failed.
        """
        bundles = [bundle, *(option for option in options if isinstance(option, Path))]
        trees = {path: self._bundle_tree(path) for path in bundles}
        self._push(tuple({tree.id: tree for tree in (self._runtime, *trees.values())}.values()))
        there = {path: f"{self._facts['root']}/{tree.kind}/{tree.id}" for path, tree in trees.items()}
        words = [there[bundle], *(there[each] if isinstance(each, Path) else each for each in options)]
        names = {there[path]: str(path) for path in bundles}
        if len(names) < len(trees):
            twins = [str(path) for path in bundles if list(there.values()).count(there[path]) > 1]
            raise UsageError(f"{' and '.join(twins)} hold the same files.", hint="Name bundles that differ.")
        started = time.monotonic()
        step = f"{verb} on {self.name}"
        self._progress(StepStarted(step))
        printed = self._run_there(step, [verb, "--json", *words], names, output)
        self._progress(StepFinished(step, time.monotonic() - started))
        return printed

    # --- what it takes ------------------------------------------------------------------------------------

    def _check_libraries(self, libraries: Mapping[str, tuple[str, str]]) -> None:
        found = self._facts["libraries"]
        wrong = [
            f"{distribution}>={least}"
            for module, (distribution, least) in libraries.items()
            if found[module] is None or (found[module] and release(found[module]) < release(least))
        ]
        if wrong:
            command = shlex.join([self._connection.address.python, "-m", "pip", "install", *wrong])
            raise MissingToolError(f"{self.name} lacks {', '.join(wrong)}.", hint=f"Run there: {command}")

    def _bundle_tree(self, path: Path) -> Tree:
        bundle = open_bundle(path)
        arch, here = bundle.manifest.requires.arch, normal_arch(self._facts["machine"])
        if arch is not None and arch != here:
            raise MissingToolError(
                f"The bundle '{path}' is for {arch}, but {self.name} is {here}.",
                hint=f"Compile the model for {here}: `edgevlm targets` lists the targets.",
            )
        return bundle_tree(bundle)

    # --- pushing ------------------------------------------------------------------------------------------

    def _push(self, trees: Sequence[Tree]) -> None:
        """Take there what is not there yet."""
        have = self._have(trees)
        missing = [(tree, at) for tree, at in zip(trees, have["offsets"], strict=True) if at is not None]
        n_bytes = sum(tree.n_bytes - at for tree, at in missing)
        if n_bytes > have["free_bytes"]:
            raise StoreError(
                f"{self.name} has {_mb(have['free_bytes'])} free where edgevlm keeps its files "
                f"('{self._facts['root']}'), but {_mb(n_bytes)} are to be pushed.",
                hint="Free some space there, or set EDGEVLM_CACHE there to a folder on a larger disk.",
            )
        for tree, at in missing:
            self._push_one(tree, at)
        if missing:
            used = self._have(trees)["used_bytes"]
            self._progress(Note(f"What was pushed takes {_mb(used)} on {self.name}, in '{self._facts['root']}'."))

    def _have(self, trees: Sequence[Tree]) -> dict[str, Any]:
        return self._connection.ask({"what": "have", "trees": [_request(tree) for tree in trees]})

    def _push_one(self, tree: Tree, offset: int) -> None:
        step, started = f"push {tree.what} to {self.name}", time.monotonic()
        self._progress(StepStarted(step, _mb(tree.n_bytes)))
        with self._connection.session({"what": "take", "tree": _request(tree), "offset": offset}) as session:
            n_sent = offset
            for chunk in _content(tree, offset):
                if not session.send(chunk):
                    break  # the reply says why
                n_sent += len(chunk)
                share = f"{_mb(n_sent)} of {_mb(tree.n_bytes)}"
                self._progress(StepProgress(step, n_sent / tree.n_bytes, share))
            session.finish()
            session.reply()
        self._progress(StepFinished(step, time.monotonic() - started))

    # --- running ------------------------------------------------------------------------------------------

    def _run_there(self, step: str, arguments: list[str], names: dict[str, str], output: Path | None) -> bytes:
        request = {
            "what": "run", "arguments": arguments, "runtime": self._runtime.id, "has_output": output is not None
        }  # fmt: skip

        def local(text: str) -> str:
            for there, here in names.items():
                text = text.replace(there, here)
            return text

        with self._connection.session(request, say=lambda line: self._relay(step, local(line))) as session:
            session.stay_alive()
            reply = session.reply()
            printed = session.read(reply["n_bytes"])
            if reply["has_output"] and output is not None:
                self._unpack(session, output)
            session.end()
            said = local(session.said())
        for there, here in names.items():
            printed = printed.replace(_in_json(there), _in_json(here))
        if reply["exit_code"] != 0 and (not printed.strip() or reply["exit_code"] not in (1, GateError.exit_code)):
            raise error_from(reply["exit_code"], said, self.name)
        return printed

    def _unpack(self, session: _Session, output: Path) -> None:
        """What the verb wrote there, under its name here once all of it has come."""
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=output.parent) as folder:
            with contextlib.suppress(tarfile.TarError):  # what was cut off; the end of the session says so, too
                _extract(session.stdout, Path(folder))
            session.stdout.read()
            if session.end() != 0:
                raise self._connection.failure(session)
            try:
                Path(folder, "output").rename(output)
            except OSError as error:
                message = f"'{output}' cannot be written: {error.strerror}."
                raise StoreError(message, hint="Name a new folder.") from error

    def _relay(self, step: str, line: str) -> None:
        if line.startswith("note: "):
            self._progress(Note(f"{self.name}: {line.removeprefix('note: ')}"))
        elif line:
            self._progress(StepProgress(step, None, line))


def _request(tree: Tree) -> dict[str, Any]:
    return {"kind": tree.kind, "id": tree.id, "files": tree.listing()}


def _content(tree: Tree, offset: int) -> Iterator[bytes]:
    """A tree's bytes, one file after the other, from ``offset`` on."""
    for file in tree.files:
        n_skipped = min(offset, file.n_bytes)
        offset -= n_skipped
        if n_skipped < file.n_bytes:
            with Path(file.local).open("rb") as opened:
                opened.seek(n_skipped)
                while chunk := opened.read(_CHUNK_BYTES):
                    yield chunk


def _extract(stream: IO[bytes], folder: Path) -> None:
    """Plain files and folders alone, all of them below ``output``."""
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            parts = member.name.split("/")
            if parts[0] != "output" or ".." in parts or not (member.isfile() or member.isdir()):
                raise DataError(f"The device sent {member.name!r}, which is no plain file.", hint="Try again.")
            target = folder.joinpath(*parts)
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
            elif (content := archive.extractfile(member)) is not None:
                with target.open("xb") as written:
                    shutil.copyfileobj(content, written)


def _in_json(text: str) -> bytes:
    return json.dumps(text, ensure_ascii=False)[1:-1].encode()


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"


# --- the connection ---------------------------------------------------------------------------------------


@contextmanager
def _connected(address: Address) -> Iterator[_Connection]:
    """One connection, shared by all sessions, as long as the block lasts.

    The command that holds it open reads its standard input, which is ours: it ends when this process does.
    """
    with tempfile.TemporaryDirectory(prefix="edgevlm-ssh-") as folder:
        connection = _Connection(address, socket=f"{folder}/s")
        nonce = secrets.token_hex(16)
        held = connection.start(_GREET.replace("{nonce}", nonce), is_master=True)
        try:
            with _limited(held.process, _GREETING_TIMEOUT_S):
                version = held.line_after(nonce)
            if version is None:
                raise connection.no_python(held)
            version = version.strip()
            if release(version) < release(LEAST_PYTHON):
                raise MissingToolError(
                    f"{address.name} has Python {version} as '{address.python}'; "
                    f"edgevlm needs {LEAST_PYTHON} or newer.",
                    hint=f"Install a newer one there, and name it: ssh://{address.name}?python=/path/to/python3",
                )
            connection.python = release(version)
            yield connection
        finally:
            held.close()


@contextmanager
def _limited(process: subprocess.Popen[bytes], limit_s: float) -> Iterator[None]:
    """Kill what takes longer."""
    timer = threading.Timer(limit_s, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Connection:
    def __init__(self, address: Address, *, socket: str) -> None:
        self.address = address
        self.python: tuple[int, ...] = ()
        self._socket = socket
        self._source = Path(far_side.__file__).read_text(encoding="utf-8")

    def start(self, code: str, *, is_master: bool = False, say: Say | None = None) -> _Session:
        """Run Python code there over the shared connection."""
        where = self.address
        command = [
            "ssh", *(["-F", where.config_file] if where.config else []),
            *(part for option in _OPTIONS for part in ("-o", option)),
            "-o", f"ControlMaster={'yes' if is_master else 'no'}", "-S", self._socket.replace("%", "%%"),
            *(["-p", str(where.port)] if where.port else []), *(["-l", where.user] if where.user else []),
            "--", where.host, f"exec {_quoted(where.python)} -c {shlex.quote(code)}",
        ]  # fmt: skip
        return _Session(self, command, say)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self.session(request) as session:
            return session.reply()

    @contextmanager
    def session(self, request: dict[str, Any], *, say: Say | None = None) -> Iterator[_Session]:
        """One request; what follows it is sent in the block, which ends with the session."""
        session = self.start(_FAR_SIDE, say=say)
        session.nonce = secrets.token_hex(16)
        try:
            line = {"source": self._source, "request": {**request, "nonce": session.nonce}}
            session.send(json.dumps(line).encode() + b"\n")
            yield session
        finally:
            session.close()

    def failure(self, session: _Session) -> EdgeVLMError:
        """Why a session ended without an answer."""
        code, said = session.end(), session.said()
        if code == 255 or code < 0:
            return _connection_error(self.address, said, was_there=True)
        last = said.strip().splitlines()[-1:] or [f"status {code}"]
        return EdgeVLMError(f"Python failed on {self.address.name}: {last[0]}", hint="Log in and try its Python.")

    def no_python(self, session: _Session) -> EdgeVLMError:
        code, said = session.end(), session.said()
        if code == 255 or code < 0:
            return _connection_error(self.address, said, was_there=False)
        last = said.strip().splitlines()[-1:] or [f"status {code}"]
        return MissingToolError(
            f"'{self.address.python}' does not run on {self.address.name}: {last[0].rstrip('.')}.",
            hint=f"Install Python {LEAST_PYTHON} or newer there, or name it: "
            f"ssh://{self.address.name}?python=/path/to/python3",
        )


def _quoted(program: str) -> str:
    """For the device's shell, whichever that is; it shall expand nothing but a leading ``~``."""
    return f'"$HOME"/{shlex.quote(program[2:])}' if program.startswith("~/") else shlex.quote(program)


def _connection_error(address: Address, said: str, *, was_there: bool) -> MissingToolError:
    """What ssh said, as a sentence with its remedy.

    Args: was_there: the device had answered before.
    """
    name = address.name
    if "IDENTIFICATION HAS CHANGED" in said:
        return MissingToolError(
            f"{name} shows another host key than the one that is known for it: it was set up anew, or is not the "
            "device that it claims to be.",
            hint=f"If it was set up anew, run: {_forgetting(address, said)}; then {address.login}, once.",
        )
    if "Host key verification failed" in said or "host key is known" in said:
        return MissingToolError(
            f"The host key of {name} is not known here.",
            hint=f"Check its fingerprint and accept it once: {address.login}",
        )
    if "Permission denied" in said or "Too many authentication failures" in said:
        return MissingToolError(
            f"{name} does not let us in without a password.",
            hint=f"Set up a key with ssh-copy-id, until this asks nothing: {address.login}",
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = (lines[-1] if lines else "the connection was closed").removeprefix("ssh: ").rstrip(".")
    last = re.sub(r"^connect to host .* port \d+: ", "", last)
    return MissingToolError(
        f"The connection to {name} is lost: {last}." if was_there else f"{name} cannot be reached: {last}.",
        hint=f"Check that the device is on and that this works: {address.login}",
    )


def _forgetting(address: Address, said: str) -> str:
    """What removes the key that ssh holds against a host, under the name and in the file that ssh itself says.

    An alias or a configuration's HostName, Port, HostKeyAlias or UserKnownHostsFile may change both.
    Source: OpenSSH's sshconnect.c, check_host_key.
    """
    name = re.search(r"host key for (\S+) has changed", said, re.IGNORECASE)
    file = re.search(r"^Offending (?:\S+ )?key in (.+):\d+$", said, re.MULTILINE)
    known = address.host if address.port in (None, 22) else f"[{address.host}]:{address.port}"
    return shlex.join(["ssh-keygen", "-R", name[1] if name else known, *(["-f", file[1]] if file else [])])


class _Session:
    """A process of ssh with its three streams."""

    def __init__(self, connection: _Connection, command: Sequence[str], say: Say | None) -> None:
        self._connection = connection
        self._say = say
        self._lines: list[str] = []
        self._over = threading.Event()
        self.nonce = ""
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Ctrl-C is this process's: it ends the far side before the connection.
            start_new_session=True,
            env={**os.environ, "LC_ALL": "C"},
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self._reader = threading.Thread(target=self._read_stderr, args=(self.process.stderr,), daemon=True)
        self._reader.start()

    def send(self, content: bytes) -> bool:
        """Whether anybody still takes it."""
        try:
            self.stdin.write(content)
            self.stdin.flush()
        except (BrokenPipeError, ValueError):
            return False
        return True

    def line_after(self, nonce: str) -> str | None:
        """The rest of the line that holds the nonce, or the next one where nothing follows; None where none comes."""
        for line in self.stdout:
            _, found, rest = line.decode(errors="replace").partition(nonce)
            if found:
                return rest if rest.strip() else self.stdout.readline().decode()
        return None

    def reply(self) -> dict[str, Any]:
        """What the far side answers.

        Raises: EdgeVLMError: the connection is lost, or the far side refused.
        """
        line = self.line_after(self.nonce)
        if not line:
            raise self._connection.failure(self)
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise _refusal(self._connection.address.name, answer["refused"], answer["reason"])
        return answer

    def read(self, n_bytes: int) -> bytes:
        content = self.stdout.read(n_bytes)
        if len(content) < n_bytes:
            raise self._connection.failure(self)
        return content

    def stay_alive(self) -> None:
        """Give signs of life from now on, so that the far side knows a lost connection from a long measurement."""

        def beat() -> None:
            while not self._over.wait(_SIGN_OF_LIFE_S) and self.send(b"\n"):
                pass

        threading.Thread(target=beat, daemon=True).start()

    def finish(self) -> None:
        """Say that nothing more comes."""
        self._over.set()
        with contextlib.suppress(OSError):
            self.stdin.close()

    def said(self) -> str:
        """Standard error so far; all of it once the session has ended."""
        return "\n".join(self._lines)

    def end(self) -> int:
        """Say that nothing more comes, and wait for its end."""
        self.finish()
        try:
            code = self.process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._reader.join(_END_TIMEOUT_S)
        return code

    def close(self) -> None:
        self.end()
        self.stdout.close()

    def _read_stderr(self, stream: IO[bytes]) -> None:
        with stream:
            for raw in stream:
                line = raw.decode(errors="replace").rstrip("\r\n")
                self._lines.append(line)
                if self._say is not None:
                    self._say(line)


def _refusal(name: str, kind: str, reason: str) -> EdgeVLMError:
    if kind == "busy":
        return StoreError(f"Another push of the same files to {name} is under way.", hint="Wait until it has ended.")
    if kind == "changed":
        return DataError(f"'{reason}' did not reach {name} as it was sent.", hint="Run the command again.")
    return StoreError(
        f"{name} cannot write its files: {reason}.",
        hint="Free some space there, or set EDGEVLM_CACHE there to a folder that can be written.",
    )
