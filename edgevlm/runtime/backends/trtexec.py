"""TensorRT through ``trtexec`` alone, where its Python module is not: builds an engine, runs and profiles it.

Each call is a process, which loads the engine anew: good enough to check what an engine answers, and never to time it.
Its outputs come as text with six digits.

Sources: docs.nvidia.com/deeplearning/tensorrt, "Command-Line Programs"; NVIDIA/TensorRT, samples/trtexec and
samples/common (sampleDevice.cpp, sampleOptions.cpp, sampleReporting.cpp, sampleUtils.cpp, logging.h).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from edgevlm.errors import EdgeVLMError, MissingToolError, ModelError, StoreError, UsageError
from edgevlm.runtime.backends.onnxruntime import OnnxRuntime
from edgevlm.runtime.engine import (
    BuildSettings,
    EngineCard,
    check_feeds,
    graph_digest,
    quoted_name,
    read_card,
    trtexec_command,
    write_card,
)
from edgevlm.runtime.engine_layers import EngineLayers, layers_from_inspector, with_times
from edgevlm.runtime.spec import Array, SessionOptions, TensorSpec

PLACES = ("/usr/src/tensorrt/bin/trtexec",)
"""Where JetPack and NVIDIA's Debian packages put it, which is not on the PATH."""

# A Jetson Orin Nano takes minutes for a MobileNet and the better part of an hour for a large vision transformer at the
# highest level; what takes longer than these hangs.
BUILD_TIMEOUT_S = 4 * 3600.0
RUN_TIMEOUT_S = 600.0
_HELP_TIMEOUT_S = 60.0

_N_PROFILED = 20

# What trtexec says after the sentence that tells why.
_CONSEQUENCES = (
    "engine set up failed", "failed to create engine", "engine could not be created", "building engine failed",
    "parsing model failed", "failed to parse onnx file", "network and config setup failed", "inference set up failed",
    "error occurred during inference",
)  # fmt: skip
_NO_GPU = ("no cuda-capable device", "cannot find any available devices", "driver version is insufficient")
_NO_SPACE = ("saving engine to file failed", "no space left on device")


@dataclass(frozen=True, kw_only=True)
class TrtExec:
    """A ``trtexec`` that was asked for its help.

    Args:
        version: of its TensorRT, with the number of its build where it says that: ``10.3.0.26``.
        major: which flags it takes.
    """

    program: Path
    version: str
    major: Literal[10, 11]

    def build(self, graph: Path, out: Path, *, settings: BuildSettings, timing_cache: Path | None = None) -> EngineCard:
        """Build the engine ``out`` from an ONNX graph, and write its card beside it, from what trtexec prints.

        Args:   timing_cache: read where it is there, and written: makes the next build shorter.
        Raises: ModelError: TensorRT does not take the graph, or cannot build it in time. MissingToolError: there is no
            GPU. StoreError: the engine cannot be written. UsageError: the settings ask for what trtexec does not do.
        """
        if settings.backend != "tensorrt" or settings.compute_capabilities:
            raise UsageError(
                "trtexec builds engines of the full TensorRT for the GPU at hand alone.",
                hint="Use `edgevlm compile` on a machine with TensorRT for RTX.",
            )
        # The graph first: one that ONNX Runtime does not open is not worth minutes.
        described = OnnxRuntime().open(graph, SessionOptions(n_threads=1, graph_level="none"))
        partial = out.with_name(f"partial-{out.name}")
        _, *arguments = trtexec_command(str(graph), str(partial), settings, major=self.major)
        if timing_cache:
            arguments.append(f"--timingCacheFile={timing_cache}")
        said = self._run(arguments, folder=out.parent, timeout_s=BUILD_TIMEOUT_S, doing=f"build '{graph.name}'")
        gpu = re.search(r"Compute Capability: (\d+\.\d+)", said)
        if gpu is None or not partial.is_file() or not partial.stat().st_size:
            missing = "left no engine" if gpu else "did not say for which GPU"
            raise ModelError(
                f"trtexec of TensorRT {self.version} ended well but {missing}, building '{graph.name}': "
                f"{_last_line(said)}.",
                hint="Run the trtexec line of the form's build.sh.txt by hand and report what it prints.",
            )
        partial.replace(out)
        card = EngineCard(
            version=self.version,
            compute_capabilities=(gpu.group(1),),
            graph_sha256=graph_digest(graph),
            settings=settings,
            inputs=described.inputs,
            outputs=described.outputs,
        )
        write_card(out, card)
        return card

    def open(self, engine: Path) -> TrtExecSession:
        """An engine of this version, to be run a process at a time.

        Raises: BundleError: it has no card.
        """
        return TrtExecSession(self, engine, read_card(engine))

    def _run(self, arguments: Sequence[str], *, folder: Path, timeout_s: float, doing: str) -> str:
        """What it printed.

        Raises: as ``build``.
        """
        code, said = _ran(self.program, arguments, folder=folder, timeout_s=timeout_s, doing=doing)
        if code != 0:
            raise _failure(said, code, f"trtexec of TensorRT {self.version} could not {doing}")
        return said


class TrtExecSession:
    """An engine that every run loads anew; for checking its answers."""

    def __init__(self, tool: TrtExec, engine: Path, card: EngineCard) -> None:
        self.inputs, self.outputs = card.inputs, card.outputs
        self._tool, self._engine, self._card = tool, engine.absolute(), card

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        check_feeds(feeds, self._card)
        with tempfile.TemporaryDirectory(prefix="edgevlm-") as folder:
            answers = Path(folder) / "answers.json"
            once = ("--iterations=1", "--warmUp=0", "--duration=0", f"--exportOutput={answers.name}")
            self._tool._run(
                (*self._fed(feeds, Path(folder)), *once),
                folder=Path(folder),
                timeout_s=RUN_TIMEOUT_S,
                doing=f"run '{self._engine.name}'",
            )
            return self._answers(answers)

    def profile(self, feeds: Mapping[str, Array]) -> EngineLayers:
        """What each layer takes on these inputs.

        Raises: ModelError: trtexec does not run the engine, or what it writes cannot be read.
        """
        check_feeds(feeds, self._card)
        with tempfile.TemporaryDirectory(prefix="edgevlm-") as folder:
            profile, layers = Path(folder) / "profile.json", Path(folder) / "layers.json"
            said = self._tool._run(
                (
                    *self._fed(feeds, Path(folder)),
                    *(f"--iterations={_N_PROFILED}", "--duration=0", "--profilingVerbosity=detailed"),
                    *("--dumpProfile", "--separateProfileRun"),
                    *(f"--exportProfile={profile.name}", f"--exportLayerInfo={layers.name}"),
                ),
                folder=Path(folder),
                timeout_s=RUN_TIMEOUT_S,
                doing=f"profile '{self._engine.name}'",
            )
            try:
                n_runs, times = _times_from(profile.read_text(encoding="utf-8", errors="replace"))
                listed = layers_from_inspector(layers.read_text(encoding="utf-8", errors="replace"))
            except (OSError, ValueError) as error:
                raise ModelError(
                    f"What trtexec of TensorRT {self._tool.version} wrote of '{self._engine.name}' cannot be read: "
                    f"{error}.",
                    hint="Report this with the version of TensorRT.",
                ) from error
        device = re.search(r"Selected Device: (.+)", said)
        return EngineLayers(
            measured_by=f"trtexec of TensorRT {self._tool.version}",
            device=device.group(1).strip() if device else f"compute capability {self._card.compute_capabilities[0]}",
            n_runs=n_runs,
            layers=with_times(listed, times),
        )

    def _fed(self, feeds: Mapping[str, Array], folder: Path) -> tuple[str, ...]:
        files = []
        for index, spec in enumerate(self.inputs):
            (folder / f"input-{index}.bin").write_bytes(np.ascontiguousarray(feeds[spec.name]).tobytes())
            files.append(f"{quoted_name(spec.name)}:input-{index}.bin")
        free = [name for name in feeds if name in self._card.settings.shapes]
        sizes = [f"{quoted_name(name)}:{'x'.join(map(str, feeds[name].shape))}" for name in free]
        shapes = (f"--shapes={','.join(sizes)}",) if sizes else ()
        return (f"--loadEngine={self._engine}", f"--loadInputs={','.join(files)}", *shapes)

    def _answers(self, file: Path) -> dict[str, Array]:
        try:
            found = _tensors_from(file.read_text(encoding="utf-8", errors="replace"))
            return {spec.name: _array(spec, found[spec.name]) for spec in self.outputs}
        except (OSError, ValueError, KeyError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ModelError(
                f"What trtexec of TensorRT {self._tool.version} wrote as the answers of '{self._engine.name}' cannot "
                f"be read: {what}.",
                hint="Report this with the version of TensorRT.",
            ) from error


def find_trtexec() -> TrtExec | None:
    """The machine's ``trtexec``; null where there is none.

    Raises: MissingToolError: there is one that does not run, or is of no version that is known.
    """
    found = shutil.which("trtexec") or next((place for place in PLACES if shutil.which(place)), None)
    if found is None:
        return None
    program = Path(found)
    code, said = _ran(program, ("--help",), folder=program.parent, timeout_s=_HELP_TIMEOUT_S, doing="tell its version")
    version = version_from(said)
    if version is None:
        raise MissingToolError(
            f"'{program}' does not say which TensorRT it is of; it ended with {code} and printed: {_first_line(said)}.",
            hint="Put the trtexec of TensorRT 10.3 or newer first on the PATH.",
        )
    if int(version.split(".")[0]) < 10:
        raise MissingToolError(
            f"'{program}' is of TensorRT {version}, and graphs with 8-bit and 4-bit weights need 10.3.",
            hint="Install TensorRT 10.3 or newer (JetPack 6.1), or put its trtexec first on the PATH.",
        )
    return TrtExec(program=program, version=version, major=10 if "--stronglyTyped" in said else 11)


def version_from(said: str) -> str | None:
    """The version in what trtexec prints first: ``[TensorRT v101300] [b35]``, or with dots.

    Example:
        >>> version_from("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] [b26] # trtexec --help")
        '10.3.0.26'
    """
    found = re.search(r"\[TensorRT v([\d.]+)\](?: \[b(\d+)\])?", said)
    if found is None:
        return None
    digits, build = found.groups()
    if "." in digits:
        parts = digits
    elif len(digits) >= 5:  # two digits each for the last two parts since 10.0
        parts = f"{int(digits[:-4])}.{int(digits[-4:-2])}.{int(digits[-2:])}"
    else:  # v8602 is 8.6.2
        parts = f"{int(digits) // 1000}.{int(digits) // 100 % 10}.{int(digits) % 100}"
    return f"{parts}.{build}" if build else parts


def _ran(program: Path, arguments: Sequence[str], *, folder: Path, timeout_s: float, doing: str) -> tuple[int, str]:
    """Exit status, and what it printed on both streams, in order."""
    try:
        ran = subprocess.run(
            [str(program), *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"'{program}' was stopped: after {timeout_s / 60:.3g} minutes it had not come to {doing}.",
            hint="Make sure that nothing else uses the GPU, and try again.",
        ) from error
    except OSError as error:
        raise MissingToolError(
            f"'{program}' cannot be run: {(error.strerror or str(error)).lower()}.",
            hint="Reinstall it: sudo apt install --reinstall libnvinfer-bin",
        ) from error
    return ran.returncode, ran.stdout.decode(errors="replace")


def _failure(said: str, code: int, what: str) -> EdgeVLMError:
    """What a run that failed says, in a sentence."""
    low = said.lower()
    rejected = _rejected_node(said)
    ended = f"signal {-code} ended it" if code < 0 else f"it ended with {code}"
    words = rejected or "; ".join(_errors(said)) or f"{ended}, and the last that it printed is: {_last_line(said)}"
    message = f"{what}: {words[:600].rstrip('.:; ')}."
    if any(each in low for each in _NO_SPACE):
        return StoreError(message, hint="Free some space, or set TMPDIR to a folder on another disk.")
    if any(each in low for each in _NO_GPU):
        return MissingToolError(message, hint="Run this on the machine with the GPU, with its driver installed.")
    if rejected:
        return ModelError(message, hint="Lower the graph anew by edgevlm for this target, or use another backend.")
    return ModelError(message, hint="Use a form that TensorRT builds, or another backend.")


def _errors(said: str) -> list[str]:
    """The last few lines that tell what went wrong, without those that only tell what came of it."""
    found = re.findall(r"^\[[^\]]*\] \[[EF]\] (?:\[TRT\] )?(.+?)\s*$", said, re.MULTILINE)
    causes = [line for line in found if not line.lower().startswith(_CONSEQUENCES)]
    return [line.rstrip(".") for line in dict.fromkeys((causes or found)[-3:])]


def _rejected_node(said: str) -> str:
    """Which node TensorRT's parser does not take, and why; empty where it names none."""
    node = re.search(r"While parsing node number \d+ \[(\w+)", said)
    if node is None:
        return ""
    rest = said[node.end() :]
    name = re.search(r'^name: "(.*)"', rest, re.MULTILINE)
    why = re.search(r"ERROR: (.+)", rest)
    named = f"node '{name.group(1)}' ({node.group(1)})" if name else f"a node {node.group(1)}"
    return f"{named}: {why.group(1).strip() if why else 'it does not take it'}"


def _first_line(said: str) -> str:
    lines = (re.sub(r"^\[[^\]]*\] \[[A-Z]\]", "", line).strip() for line in said.splitlines())
    return next((line.rstrip(".:") for line in lines if line), "nothing")[:200]


def _last_line(said: str) -> str:
    return _first_line("\n".join(reversed(said.splitlines())))


# --- what it writes ---------------------------------------------------------------------------------------


class _Tensor(msgspec.Struct, frozen=True):
    name: str
    dimensions: str
    values: list[float]


def _tensors_from(text: str) -> dict[str, _Tensor]:
    """``[{"name": .., "dimensions": "1x1000", "values": [..]}, ..]``.

    Numbers that are none stand in it as C++ prints them, which is no JSON.

    Raises: ValueError: it is something else.
    """
    words = re.sub(r"(?<=[\[ ])-?nan(?=[ ,\]])", "NaN", text)
    words = re.sub(r"(?<=[\[ ])(-?)inf(?=[ ,\]])", r"\1Infinity", words)
    try:
        found = msgspec.convert(json.loads(words), list[_Tensor])
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error
    return {each.name: each for each in found}


def _array(spec: TensorSpec, tensor: _Tensor) -> Array:
    shape = tuple(int(size) for size in tensor.dimensions.split("x")) if tensor.dimensions else ()
    return np.array(tensor.values, dtype=spec.dtype).reshape(shape)


def _times_from(text: str) -> tuple[int, dict[str, float]]:
    """Runs, and milliseconds by layer, from ``[{"count": 20}, {"name": .., "medianMs": ..}, ..]``.

    Raises: ValueError: it is something else.
    """
    try:
        first, *rows = msgspec.json.decode(text.encode(), type=list[dict[str, Any]])
        times: dict[str, float] = {}
        for row in rows:
            # Releases before 8.5 had no median.
            times[str(row["name"])] = times.get(str(row["name"]), 0.0) + float(row.get("medianMs", row["averageMs"]))
        return int(first["count"]), times
    except (msgspec.MsgspecError, KeyError, TypeError) as error:
        raise ValueError(f"the profile is not as documented: {error}") from error
