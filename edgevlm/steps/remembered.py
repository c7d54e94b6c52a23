"""A graph's answers, kept by what it was fed: combinations of two towers ask each tower the same over and over."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from edgevlm.runtime.backends import Session
from edgevlm.runtime.spec import Array, TensorSpec

# A thousand texts and as many pictures in CLIP's 512 numbers take 4 MB; SAM's image embeddings 4 MB a picture.
MAX_BYTES = 256 << 20


@dataclass(kw_only=True, eq=False)
class Memory:
    """What may be kept by all sessions together; what comes when it is full is computed each time."""

    max_bytes: int = MAX_BYTES
    n_bytes: int = 0
    answers: dict[str, dict[str, Array]] = field(default_factory=dict)

    def keep(self, key: str, answer: dict[str, Array]) -> None:
        size = sum(value.nbytes for value in answer.values())
        if self.n_bytes + size <= self.max_bytes:
            self.answers[key] = answer
            self.n_bytes += size


class RememberedSession:
    """A session that runs what it was not asked before.

    Args:
        identity: the same where the same feeds give the same answers.
        opened: opens the graph; called when it is first needed.
    """

    def __init__(self, identity: str, opened: Callable[[], Session], memory: Memory) -> None:
        self._identity = identity
        self._open = opened
        self._memory = memory

    @cached_property
    def _session(self) -> Session:
        return self._open()

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._session.inputs

    @cached_property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._session.outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        key = self._key(feeds)
        if key not in self._memory.answers:
            answer = self._session.run(feeds)
            self._memory.keep(key, dict(answer))
            return answer
        return dict(self._memory.answers[key])

    def _key(self, feeds: Mapping[str, Array]) -> str:
        digest = hashlib.blake2b(self._identity.encode(), digest_size=32)
        for name in sorted(feeds):
            value = feeds[name]
            digest.update(f"\0{name}\0{value.dtype.str}{value.shape}\0".encode())
            digest.update(value.tobytes())
        return digest.hexdigest()
