"""Where a measurement was taken."""

from __future__ import annotations

import hashlib
import platform

import msgspec
import numpy as np

import edgevlm
from edgevlm.measure.spec import Environment
from edgevlm.runtime.backends import BACKENDS, load_backend
from edgevlm.runtime.machine import describe_machine

_MEMORY_STEP_BYTES = 1 << 28  # a kernel update or a resized frame buffer moves MemTotal by some megabytes


def describe_environment() -> Environment:
    """This machine with the versions that decide how fast a graph runs here."""
    machine = describe_machine()
    versions = {name: load_backend(name).version() for name in BACKENDS}
    tools = {name: version for name, version in versions.items() if version is not None}
    return Environment(
        machine=machine.name,
        arch=machine.arch,
        isa=machine.isa,
        n_cores=machine.n_logical_cores,
        memory_bytes=machine.memory_bytes,
        os=machine.os,
        python=platform.python_version(),
        tools={"edgevlm": edgevlm.__version__, "numpy": np.__version__, **tools},
    )


def fingerprint(environment: Environment) -> str:
    """A key for what was measured here: equal on the same machine with the same tools, else different."""
    rounded = msgspec.structs.replace(
        environment, memory_bytes=round(environment.memory_bytes / _MEMORY_STEP_BYTES) * _MEMORY_STEP_BYTES
    )
    return hashlib.sha256(msgspec.json.encode(rounded, order="deterministic")).hexdigest()
