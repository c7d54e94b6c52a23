"""What runs on a device reached over SSH: it takes files, checks them, runs a verb and sends back what that gave.

The text of this file goes along with every request and runs there with Python's standard library alone. A request is
one line of JSON on standard input, so that no name in it ever meets a shell; what follows the line are a file tree's
bytes, or nothing but signs of life. The reply on standard output is the request's nonce, a line of JSON, and what the
JSON announces: a login script may have printed something before it.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

Request = dict[str, Any]

# The other side gives a sign of life every 15 s: after this long it is gone, even where the system has not noticed.
SILENCE_S = 90.0
# What a verb gets to put its things in order after Ctrl-C before it is killed.
GRACE_S = 5.0
# A push that was broken off and never taken up again is forgotten after a week.
FORGET_AFTER_S = 7 * 24 * 3600.0
_CHUNK_BYTES = 1 << 20


class Refused(Exception):
    """What cannot be done here; ``kind`` tells the other side which sentence to make of it."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


def main(request: Request) -> None:
    """Answer one request; standard input stands behind its line."""
    try:
        ANSWERS[request["what"]](request)
    except Refused as refused:
        reply(request, {"refused": refused.kind, "reason": str(refused)})
    except BrokenPipeError:
        pass  # nobody listens any more
    except OSError as error:
        reply(request, {"refused": "disk", "reason": f"{error.filename or root()}: {error.strerror or error}"})


def reply(request: Request, value: Request) -> None:
    sys.stdout.buffer.write(f"{request['nonce']}\n{json.dumps(value)}\n".encode())
    sys.stdout.buffer.flush()


def root() -> Path:
    """The folder of what was pushed, in edgevlm's cache."""
    cache = os.environ.get("EDGEVLM_CACHE") or os.path.join(  # noqa: PTH118 - "" must not become "."
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "edgevlm"
    )
    return Path(cache).expanduser().absolute() / "device"


# --- what is here -----------------------------------------------------------------------------------------


def look(request: Request) -> None:
    """The machine, the libraries (module -> version; "" where nobody tells, null where it is missing), the folder."""
    libraries = {name: _version(name, distribution) for name, distribution in request["libraries"].items()}
    reply(
        request,
        {"machine": platform.machine(), "executable": sys.executable, "libraries": libraries, "root": str(root())},
    )


def _version(module: str, distribution: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""  # the module comes with another distribution: onnxruntime-gpu, a system's package


def have(request: Request) -> None:
    """For each tree how many of its bytes are here, null where all of it is; and the room."""
    _forget_old()
    offsets = [None if _is_whole(tree) else _offset(_partial(tree), tree) for tree in request["trees"]]
    existing = next(path for path in (root(), *root().parents) if path.exists())
    used = sum(file.lstat().st_size for file in root().rglob("*") if file.is_file())
    reply(request, {"offsets": offsets, "free_bytes": shutil.disk_usage(existing).free, "used_bytes": used})


def _forget_old() -> None:
    for left in (*root().glob("*/.*.partial"), *root().glob(".run-*")):
        if time.time() - left.stat().st_mtime > FORGET_AFTER_S:
            shutil.rmtree(left, ignore_errors=True)


def _is_whole(tree: Request) -> bool:
    """Whether the tree is here with every file at its size; one that lost a file since is taken anew."""
    home = _home(tree)
    if not home.is_dir():
        return False
    if all(_size(home / path) == n_bytes for path, n_bytes, _ in tree["files"]):
        return True
    shutil.rmtree(home)
    return False


def _home(tree: Request) -> Path:
    return root() / str(tree["kind"]) / str(tree["id"])


def _partial(tree: Request) -> Path:
    return root() / str(tree["kind"]) / f".{tree['id']}.partial"


def _offset(folder: Path, tree: Request) -> int:
    """How far an earlier push came: files are written one after the other."""
    offset = 0
    for path, n_bytes, _ in tree["files"]:
        size = max(0, _size(folder / path))
        offset += min(size, n_bytes)
        if size != n_bytes:
            break
    return offset


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1


# --- taking files -----------------------------------------------------------------------------------------


def take(request: Request) -> None:
    """Write a tree's bytes from ``offset`` on under a temporary name, check every sha256, then give it its name."""
    tree, offset = request["tree"], int(request["offset"])
    home, partial = _home(tree), _partial(tree)
    partial.mkdir(parents=True, exist_ok=True)
    held = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refused("busy", str(partial)) from None
    if _offset(partial, tree) != offset:
        shutil.rmtree(partial)
        raise Refused("changed", str(partial))
    try:
        _write(partial, tree, offset, sys.stdin.buffer)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk is not to stay full
        raise
    for path, _, sha256 in tree["files"]:
        if _sha256(partial / path) != sha256:
            shutil.rmtree(partial)
            raise Refused("changed", path)
    if home.is_dir():  # another push was faster, and what it brought is the same
        shutil.rmtree(partial)
    else:
        partial.rename(home)
    os.close(held)
    reply(request, {})


def _write(folder: Path, tree: Request, offset: int, source: BinaryIO) -> None:
    for path, n_bytes, _ in tree["files"]:
        n_here = min(offset, n_bytes)
        offset -= n_here
        file = folder / path
        if n_here == n_bytes and file.exists():
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as written:
            n_left = n_bytes - n_here
            while n_left:
                chunk = source.read(min(_CHUNK_BYTES, n_left))
                if not chunk:
                    sys.exit(1)  # the other side is gone; what came is kept for the next push
                written.write(chunk)
                n_left -= len(chunk)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


# --- running a verb ---------------------------------------------------------------------------------------


def run(request: Request) -> None:
    """Run a verb; its process group ends with the connection, whatever ends that."""
    root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".run-", dir=root()) as folder:
        output = Path(folder) / "output"
        arguments = [*request["arguments"], *(["--output", str(output)] if request["has_output"] else [])]
        path = [str(root() / "runtime" / request["runtime"]), os.environ.get("PYTHONPATH", "")]
        child = subprocess.Popen(
            [sys.executable, "-m", "edgevlm", *arguments],
            cwd=folder,
            # A session over SSH may have no locale: Python would take file names for ASCII.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUTF8": "1", "NO_COLOR": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        threading.Thread(target=_end_with_connection, args=(child,), daemon=True).start()
        printed, _ = child.communicate()
        has_output = request["has_output"] and output.exists()
        reply(request, {"exit_code": child.returncode, "n_bytes": len(printed), "has_output": has_output})
        sys.stdout.buffer.write(printed)
        if has_output:
            with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as archive:
                archive.add(output, arcname="output")
        sys.stdout.buffer.flush()


def _end_with_connection(child: subprocess.Popen[bytes]) -> None:
    stdin = sys.stdin.fileno()
    while select.select([stdin], [], [], SILENCE_S)[0] and os.read(stdin, 4096):
        pass
    for number, wait_s in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, 0.0)):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            return
        end_s = time.monotonic() + wait_s
        while child.poll() is None and time.monotonic() < end_s:
            time.sleep(0.05)


ANSWERS = {"look": look, "have": have, "take": take, "run": run}
