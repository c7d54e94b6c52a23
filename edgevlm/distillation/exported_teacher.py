"""A teacher in PyTorch that is asked much, in ONNX Runtime: on a CPU several times as fast as layer by layer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edgevlm.distillation.pictures import TrainingPictures
from edgevlm.distillation.teachers import Teacher, TorchTeacher, named
from edgevlm.errors import EdgeVLMError
from edgevlm.export import export_graph
from edgevlm.progress import Note, Progress, StepProgress
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.spec import Array, SessionOptions

Ask = Callable[[Array, frozenset[str]], dict[str, Array]]
"""As ``Teacher.outputs``."""

# Below this the export takes longer than what it saves.
_WORTH_IT = 1000
_N_SAMPLES = 2


@contextmanager
def quick_outputs(
    teacher: Teacher, pictures: TrainingPictures, names: frozenset[str], *, n_rows: int, progress: Progress
) -> Iterator[Ask]:
    """``teacher.outputs``, or what answers as it does and is faster, while the block runs.

    The export proves its graph equal to the module on real pictures; where it cannot, or where what is asked lies
    inside the graph, the module itself answers.

    Args: n_rows: of all that is to be asked, done or not, so that a run that goes on takes the same way.
    """
    if not isinstance(teacher, TorchTeacher) or not teacher.is_on_cpu or n_rows < _WORTH_IT or not names:
        yield teacher.outputs
        return
    graphs = [graph for graph in teacher.picture_graphs() if names & {named(name) for name in graph.outputs}]
    if not names <= {named(name) for graph in graphs for name in graph.outputs}:
        yield teacher.outputs
        return
    image = teacher.processing.image
    samples = {image.input_name: pictures.pixels(range(min(_N_SAMPLES, pictures.n_rows)), image)}
    with tempfile.TemporaryDirectory(prefix="edgevlm-teacher-") as scratch:
        try:
            progress(StepProgress("teach", 0.0, f"exporting {teacher.model.name}"))
            made = [
                export_graph(teacher.model, graph.name, batch=None, out=Path(scratch), samples=samples)
                for graph in graphs
            ]
            options = SessionOptions(n_threads=teacher.n_threads)
            sessions = [load_backend("onnxruntime").open(Path(scratch) / each.file, options) for each in made]
        except (EdgeVLMError, OSError) as error:
            told = error.message if isinstance(error, EdgeVLMError) else str(error)
            progress(Note(f"{teacher.model.name} answers in PyTorch, which is slower: {told}"))
            yield teacher.outputs
            return

        def ask(pixel_values: Array, wanted: frozenset[str]) -> dict[str, Array]:
            feeds = {image.input_name: np.ascontiguousarray(pixel_values)}
            found = {name: value for session in sessions for name, value in session.run(feeds).items()}
            return {named(name): value for name, value in found.items() if named(name) in wanted}

        yield ask
