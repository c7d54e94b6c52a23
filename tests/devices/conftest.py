from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgevlm.devices.emulator import prepare_emulator
from edgevlm.errors import MissingToolError
from edgevlm.progress import silent
from tests.absent import absent
from tests.devices.server import Server, start_server


@pytest.fixture
def server() -> Iterator[Server]:
    # A name with everything that a shell could take for something else.
    folder = Path(tempfile.mkdtemp(prefix="it's $(a) device; "))
    server = None
    try:
        server = start_server(folder)
        yield server
    finally:
        if server is not None:
            server.drop_connections()
            server.process.kill()
            server.process.wait()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def emulator():
    try:
        return prepare_emulator(silent)
    except MissingToolError as error:
        absent("emulator", error.message)
