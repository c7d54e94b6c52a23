"""An artifact that runs in another environment, as a ``Session`` here: ``python -m benchmarks.suite.remote`` there.

Both ends write a length of eight bytes and an ``.npz`` of it. Answers are a rival's; judging them is edgevlm's code.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, BinaryIO

import msgspec
import numpy as np

from benchmarks.suite.making import environment_variables, last_words
from edgevlm.errors import ModelError
from edgevlm.measure.spec import Subject
from edgevlm.measure.worker import backend_named, die_with_parent, take_stdout
from edgevlm.runtime.spec import Array, TensorSpec

_SAYS = "__says__"
_FAILED = "__failed__"


class RemoteSession:
    """A subject's graph, opened by its own interpreter.

    Args:
        inputs, outputs: of the float graph: the rival's outputs come by these names.
    Raises: ModelError: it cannot be opened or run, in its tool's words.
    """

    def __init__(self, subject: Subject, *, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [subject.python or sys.executable, "-P", "-m", "benchmarks.suite.remote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment_variables(),
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self._to.write(msgspec.json.encode(subject) + b"\n")
        self._to.flush()
        self.says: dict[str, str] = msgspec.json.decode(str(self._read()[_SAYS]), type=dict[str, str])

    def __enter__(self) -> RemoteSession:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._to, self._from, self._log):
            stream.close()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        _write(self._to, feeds)
        return named_as(self._read(), [spec.name for spec in self.outputs])

    def _read(self) -> dict[str, Array]:
        arrays = _read(self._from)
        if arrays is None:
            code = self._process.wait()
            self._log.seek(0)
            raise ModelError(last_words(self._log.read().decode(errors="replace"), code))
        if _FAILED in arrays:
            raise ModelError(str(arrays[_FAILED]))
        return arrays


def named_as(outputs: Mapping[str, Array], names: list[str]) -> dict[str, Array]:
    """The outputs by the float graph's names, or in its order where a tool gave them names of its own.

    Raises: ModelError: they are not as many.
    """
    if all(name in outputs for name in names):
        return {name: outputs[name] for name in names}
    if len(outputs) != len(names):
        raise ModelError(f"It gives {', '.join(outputs)}, where {', '.join(names)} are expected.")
    return dict(zip(names, outputs.values(), strict=True))


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    subject = msgspec.json.decode(requests.readline(), type=Subject)
    try:
        session = backend_named(subject.backend).open(Path(subject.file), subject.session)
        says: dict[str, str] = getattr(session, "says", {})
        _write(replies, {_SAYS: np.array(msgspec.json.encode(says).decode())})
        while (feeds := _read(requests)) is not None:
            _write(replies, session.run(feeds))
    except Exception as error:  # whatever a tool raises belongs to this rival
        message = getattr(error, "message", None) or f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        _write(replies, {_FAILED: np.array(message)})


def _write(stream: IO[bytes], arrays: Mapping[str, Array]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: np.asarray(value) for name, value in arrays.items()})
    stream.write(len(buffer.getbuffer()).to_bytes(8, "little"))
    stream.write(buffer.getbuffer())
    stream.flush()


def _read(stream: IO[bytes]) -> dict[str, Array] | None:
    length = stream.read(8)
    if len(length) < 8:
        return None
    with np.load(io.BytesIO(stream.read(int.from_bytes(length, "little"))), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


if __name__ == "__main__":
    die_with_parent()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # judged beside others; nobody times this
    serve(sys.stdin.buffer, take_stdout())
