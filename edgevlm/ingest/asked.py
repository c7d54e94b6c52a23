"""What the user asked for, as each kind of source gets it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Args:
    name: what was written where a model is expected.
    labels: class names in order; empty where none were given.
    """

    name: str
    kind: str
    task: str | None = None
    card: Path | None = None
    revision: str | None = None
    labels: tuple[str, ...] = ()
    image_size: int | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False

    def nearest(self) -> str:
        """The hint for a model that is not there: what lies beside it and is called almost the same."""
        path = Path(self.name)
        beside = sorted(child.name for child in path.parent.iterdir()) if path.parent.is_dir() else []
        near = [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, beside, n=2)]
        near += difflib.get_close_matches(self.name, ["demo"], n=1)
        return f"Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
