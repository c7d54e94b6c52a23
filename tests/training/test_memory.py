"""Memory that is freed and asked for again stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Pages that the kernel hands out, of which each is filled with zeros first, while 64 MB are taken and freed in turns.
_COUNT = """
import resource, sys
import numpy as np
if sys.argv[1] == "keep":
    from edgevlm.training.memory import keep_memory
    keep_memory()
np.ones(8 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(8 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it asks glibc")
def test_freed_memory_is_kept() -> None:
    def pages(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", _COUNT, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert pages("keep") * 10 < pages("leave")
