"""What runs on the emulated processor while its instructions are counted: a graph, a few times, between marks.

``python -m edgevlm.devices.counted_runs REQUEST``; the marks are for the plugin (tools/qemu-plugin). With a second
word, ``show-processor``, it stops before the runs and prints /proc/cpuinfo.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import platform
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgevlm.runtime.backends import Session, load_backend
from edgevlm.runtime.spec import Array, SessionOptions, Spec, from_json

_MARK = 0x4D41524B

START, EMPTY, RUN = 1, 2, 3
"""Labels of the marks: a run or nothing begins; nothing has run; the graph has."""


SHOW = "show-processor"


class CountRequest(Spec, frozen=True, kw_only=True):
    """Args:
    inputs: an input's name to its ``.npy``.
    n_warmup: runs that are not counted: the first ones allocate and pack.
    """

    file: str
    backend: str
    session: SessionOptions
    inputs: dict[str, str]
    n_warmup: int
    n_runs: int


def open_request(file: str) -> tuple[CountRequest, Session, dict[str, Array]]:
    """A request with its open graph and its inputs."""
    request = from_json(Path(file).read_bytes(), CountRequest)
    feeds: dict[str, Array] = {name: np.load(each, allow_pickle=False) for name, each in request.inputs.items()}
    return request, load_backend(request.backend).open(Path(request.file), request.session), feeds


def run_counted(request: CountRequest, session: Session, feeds: dict[str, Array]) -> None:
    mark = _marker()
    _stop_clock()
    gc.disable()  # it would run at some run or other
    for _ in range(request.n_warmup):
        mark(START)
        session.run(feeds)
        mark(START)
    for _ in range(request.n_runs):
        mark(START)
        mark(EMPTY)
        mark(START)
        session.run(feeds)
        mark(RUN)


def _marker() -> Callable[[int], object]:
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
    return lambda label: prctl(_MARK, label, 0, 0, 0)


def _stop_clock() -> None:
    """From now on it is midnight, 1 January 1970: ONNX Runtime does more in a run that ends some seconds after another.

    The C library's ``clock_gettime`` is overwritten: str xzr, [x1]; str xzr, [x1, #8]; mov w0, #0; ret.
    """
    code = struct.pack("<4I", 0xF900003F, 0xF900043F, 0x52800000, 0xD65F03C0)
    libc = ctypes.CDLL(None, use_errno=True)
    start = ctypes.cast(libc.clock_gettime, ctypes.c_void_p).value
    assert start is not None and platform.machine() == "aarch64"
    page = start - start % mmap.PAGESIZE
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(2 * mmap.PAGESIZE), 7) != 0:  # read, write, execute
        raise OSError(ctypes.get_errno(), "the clock cannot be stopped")
    ctypes.memmove(start, code, len(code))


if __name__ == "__main__":
    opened = open_request(sys.argv[1])
    if sys.argv[2:] == [SHOW]:
        sys.stdout.write(Path("/proc/cpuinfo").read_text())
    else:
        run_counted(*opened)
