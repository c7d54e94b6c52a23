"""An OpenSSH server on loopback, as the user who runs the tests: with its own keys, configuration and cache folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from tests.absent import absent


@dataclass
class Server:
    """Args: cache: EDGEVLM_CACHE of every session. process: the server that listens."""

    folder: Path
    port: int
    cache: Path
    process: subprocess.Popen[bytes]

    def address(self, *, python: str | Path = sys.executable, config: Path | None = None, port: int = 0) -> str:
        options = urlencode({"python": str(python), "config": str(config or self.folder / "ssh_config")})
        return f"ssh://{getpass.getuser()}@127.0.0.1:{port or self.port}?{options}"

    @property
    def name(self) -> str:
        return f"{getpass.getuser()}@127.0.0.1:{self.port}"

    def config(self, name: str, **changes: str) -> Path:
        """A client's configuration that differs from the one that works."""
        options = {
            "IdentityFile": self.folder / "user_key",
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": self.folder / "known_hosts",
            "GlobalKnownHostsFile": "none",
            **changes,
        }
        file = self.folder / name
        file.write_text("Host *\n" + "".join(f'  {key} "{value}"\n' for key, value in options.items()))
        return file

    def trees(self) -> dict[Path, int]:
        """What was pushed: each whole tree and when it got its name."""
        found = (self.cache / "device").glob("*/[!.]*")
        return {path.relative_to(self.cache / "device"): path.stat().st_ctime_ns for path in found}

    def leftovers(self) -> list[Path]:
        """What a push or a run left behind."""
        return [path for path in self.cache.rglob(".*") if path.name.startswith((".run-", ".partial"))]

    def connections(self) -> int:
        return len(_children(self.process.pid))

    def drop_connections(self) -> None:
        """Kill the processes that serve a connection, as a lost network would, but at once."""
        for pid in _children(self.process.pid):
            for grandchild in _children(pid):
                # One may end by itself, or with the one that was killed before it.
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    if b"sshd" in Path(f"/proc/{grandchild}/comm").read_bytes():
                        os.kill(grandchild, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:  # it has ended
        return []


def script(file: Path, *lines: str) -> Path:
    """A shell script, such as an interpreter that is not what it should be."""
    file.write_text("\n".join(("#!/bin/sh", *lines, "")))
    file.chmod(0o755)
    return file


def python_that(file: Path, *before: str) -> Path:
    """This interpreter after some lines of shell."""
    return script(file, *before, f'exec {shlex.quote(sys.executable)} "$@"')


def start_server(folder: Path) -> Server:
    """Absent where there is no server, or where it does not start, with its own reason."""
    found = shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
    if found is None or shutil.which("ssh-keygen") is None:
        absent("ssh", "sshd or ssh-keygen is not installed")
    for name in ("host_key", "user_key", "stranger_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    host_key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
    cache = folder / "cache of the device"
    options = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": f'"{folder}/host_key"', "PidFile": "none",
        "AuthorizedKeysFile": f'"{folder}/authorized_keys"', "StrictModes": "no", "UsePAM": "no",
        "PasswordAuthentication": "no", "KbdInteractiveAuthentication": "no", "PermitRootLogin": "prohibit-password",
        "SetEnv": f'EDGEVLM_CACHE="{cache}"',
    }  # fmt: skip
    config = folder / "sshd_config"
    config.write_text("".join(f"{key} {value}\n" for key, value in options.items()))
    tested = subprocess.run([found, "-t", "-f", config], capture_output=True, text=True)
    if tested.returncode != 0:
        absent("ssh", f"sshd does not start: {tested.stderr.strip()}")
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen([found, "-D", "-e", "-f", config], stdin=subprocess.DEVNULL, stderr=log)
    server = Server(folder=folder, port=port, cache=cache, process=process)
    server.config("ssh_config")
    end = time.monotonic() + 10
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server
        time.sleep(0.05)
    process.kill()
    return absent("ssh", f"sshd does not start: {(folder / 'sshd.log').read_text().strip()}")
