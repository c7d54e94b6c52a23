"""Calibration: recipes as TOML, and activation ranges collected once per graph and method."""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from edgevlm.data_files import data_folder, data_names, read_toml
from edgevlm.errors import DataError, EdgeVLMError, ModelError, UsageError, did_you_mean
from edgevlm.progress import Progress, StepProgress, silent
from edgevlm.quantization.graphs import has_external_data, operator_counts, selected_nodes
from edgevlm.quantization.schemes import Calibration, schemes_for
from edgevlm.runtime.spec import Array, Spec

# A histogram calibrator holds every activation of a chunk at once (MobileNetV2: 27 MB a picture).
_CHUNK = 4
# 99.999 is ONNX Runtime's own default.
_PERCENTILE = 99.999
# ONNX Runtime's default for entropy, 128 bins against 128 levels, leaves one threshold to choose: the maximum.
_ENTROPY_BINS = 512


class CalibrationRecipe(Spec, frozen=True, kw_only=True):
    """How to calibrate, from ``calibration/<name>.toml``.

    Args:
        methods: how ranges may be found; each is one more pass over the pictures.
        n_samples: pictures used, at most.
        seed: picks them.
        source: where the pictures come from, in words.
        licence: under which terms.
    """

    name: str
    methods: Annotated[tuple[Calibration, ...], msgspec.Meta(min_length=1)]
    n_samples: Annotated[int, msgspec.Meta(ge=1)]
    seed: int
    source: str
    licence: str
    note: str = ""


def recipe_names() -> tuple[str, ...]:
    """The recipes that come with the package."""
    return data_names("calibration")


def load_recipe(name_or_path: str) -> CalibrationRecipe:
    """A recipe by name, or from a path that ends in ``.toml``.

    Raises: UsageError: nothing is called so, or the file says something that no recipe says.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        if name_or_path not in recipe_names():
            raise UsageError(
                f"There is no calibration recipe '{name_or_path}'.",
                hint=f"{did_you_mean(name_or_path, recipe_names())} A path to a TOML file works too.",
            )
        path = data_folder("calibration") / f"{name_or_path}.toml"
    return read_toml(path, CalibrationRecipe, what="calibration recipe")


def collect_ranges(
    graph: Path,
    feeds: Iterable[Mapping[str, Array]],
    method: Calibration,
    out: Path,
    progress: Progress = silent,
) -> Path:
    """Run a prepared graph over ``feeds`` and write the range of each activation that some scheme may quantize.

    One file serves every static scheme of that method.

    Args:
        feeds: inputs by name, one picture (or one batch) each; read once, a few at a time. Texts may each have their
            own length.
    Returns: ``out``, JSON as ONNX Runtime's ``quantize_static`` reads it.
    Raises:  DataError: there are no feeds. ModelError: an activation is NaN or infinite.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import TensorData, TensorsData, create_calibrator, save_tensors_data

    onnx_method = {
        "minmax": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }[method]
    options: dict[str, Any] = {"percentile": {"percentile": _PERCENTILE}, "entropy": {"num_bins": _ENTROPY_BINS}}
    with tempfile.TemporaryDirectory(prefix="edgevlm-calibrate-") as folder:
        calibrator = create_calibrator(
            graph,
            _op_types_to_calibrate(onnx.load(graph, load_external_data=False)),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=onnx_method,
            use_external_data_format=has_external_data(graph),
            extra_options=options.get(method, {}),
        )
        calibrator.infer_session = _FiniteSession(calibrator.infer_session, graph.name)
        n_done = 0
        # The histogram calibrators print what they do.
        with contextlib.redirect_stdout(io.StringIO()), _refusing(graph.name, method):
            for chunk in _chunks(feeds):
                calibrator.collect_data(_Reader(chunk))
                n_done += len(chunk)
                progress(StepProgress(name="ranges", detail=f"{method}: {n_done} samples"))
            if not n_done:
                raise DataError(
                    f"There is nothing to calibrate '{graph.name}' with: 0 samples.",
                    hint="Give at least one picture with --calibration-data.",
                )
            ranges = calibrator.compute_data()
    # Sorted, and without the histograms: the calibrator's order is that of a set, and differs between processes.
    bare = {
        name: TensorData(lowest=ranges[name].lowest, highest=ranges[name].highest) for name in sorted(ranges.keys())
    }
    save_tensors_data(TensorsData(onnx_method, bare), out)
    return out


@contextlib.contextmanager
def _refusing(graph: str, method: Calibration) -> Iterator[None]:
    """Numpy makes no histogram of values that hardly differ ("Too many bins for data range")."""
    try:
        yield
    except EdgeVLMError:
        raise
    except Exception as error:  # the calibrators raise whatever numpy does
        raise ModelError(
            f"ONNX Runtime cannot calibrate '{graph}' by {method}: {str(error).strip() or type(error).__name__}",
            hint="Use a recipe with another method, such as --calibration quick.",
        ) from error


def _op_types_to_calibrate(model: Any) -> list[str]:
    """Operator types that some static scheme makes int8. Others are left alone: a masked score may well be -inf."""
    schemes = schemes_for(activation_sign="u8", op_counts=operator_counts(model.graph))
    op_types = {
        node.op_type for scheme in schemes if scheme.method == "static" for node in selected_nodes(model.graph, scheme)
    }
    if not op_types:
        raise ModelError(
            "The graph has no convolution and no linear layer that could become int8.", hint="Compile it as fp32."
        )
    return sorted(op_types)


def _chunks(feeds: Iterable[Mapping[str, Array]]) -> Iterator[list[Mapping[str, Array]]]:
    """A few feeds at a time, of the same shapes: the calibrators stack what a chunk gives."""
    for _, same in itertools.groupby(feeds, key=lambda feed: {name: value.shape for name, value in feed.items()}):
        while chunk := list(itertools.islice(same, _CHUNK)):
            yield chunk


class _Reader:
    """ONNX Runtime's ``CalibrationDataReader`` over a few feeds."""

    def __init__(self, feeds: Sequence[Mapping[str, Array]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, Array] | None:
        feed = next(self._feeds, None)
        return None if feed is None else dict(feed)


class _FiniteSession:
    """An ``InferenceSession`` that refuses NaN and infinity, which the calibrators drop without a word."""

    def __init__(self, session: Any, graph: str) -> None:
        self._session = session
        self._graph = graph
        self.get_inputs = session.get_inputs
        self.get_outputs = session.get_outputs

    def run(self, names: Sequence[str] | None, feed: Mapping[str, Array]) -> list[Array]:
        for name, value in feed.items():
            self._check(f"input '{name}'", value)
        values: list[Array] = self._session.run(names, dict(feed))
        for output, value in zip(self.get_outputs(), values, strict=True):
            self._check(f"activation '{output.name}'", value)
        return values

    def _check(self, what: str, value: Array) -> None:
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            raise ModelError(
                f"Calibrating '{self._graph}' gave NaN or infinity in {what}, where numbers were expected.",
                hint="Check the model's weights and the preprocessing of the pictures.",
            )
