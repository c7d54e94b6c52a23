"""Instructions of an inference on an emulated processor, by class: which kernels run, never how fast."""

from __future__ import annotations

from edgevlm.runtime.spec import Spec

# The columns that the plugin for QEMU writes, in its order, for people. An instruction is in one class.
CLASSES = (
    "int8 dot product", "int8 matrix multiply", "float32 multiply-add", "float16 multiply-add",
    "integer SIMD multiply", "other SIMD", "SIMD load and store", "load and store", "SVE", "branch", "other",
)  # fmt: skip


class GraphInstructions(Spec, frozen=True, kw_only=True):
    """One run of a graph, as the runtime calls it, at one thread.

    Args:
        form: of the bundle, where it holds several.
        by_class: sums to ``n_instructions``; the names of ``CLASSES``.
    """

    graph: str
    precision: str
    n_instructions: int
    by_class: dict[str, int]
    form: str = ""


class Instructions(Spec, frozen=True, kw_only=True):
    """What was counted of a bundle.

    Args:
        tools: versions, by name, of what ran.
        left_out: forms that were not counted, and why.
    """

    name: str
    cpu: str
    tools: dict[str, str]
    graphs: tuple[GraphInstructions, ...]
    left_out: dict[str, str] = {}
