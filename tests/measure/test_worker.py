"""Real processes: what goes wrong in one, and what must not be left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgevlm.measure.interleave import compare
from edgevlm.measure.process import ProcessWorker, WorkerError
from edgevlm.measure.protocol import QUICK
from edgevlm.measure.spec import Comparison, Subject
from edgevlm.measure.worker import Open, OpenSubject, Times, Turn, options_for_turns, wait_due_to_others
from edgevlm.runtime.spec import SessionOptions
from tests.measure import faulty

REPOSITORY = Path(__file__).resolve().parents[2]
PROTOCOL = msgspec.structs.replace(QUICK, timeout_s=20.0)


@pytest.fixture
def inputs(tmp_path: Path) -> str:
    np.savez(tmp_path / "inputs.npz", x=np.ones((1, 64), dtype=np.float32))
    return str(tmp_path / "inputs.npz")


def faulty_subject(inputs: str, name: str, **settings: object) -> Subject:
    file = Path(inputs).with_name(f"{name}.json")
    file.write_text(json.dumps(settings))
    return Subject(name=name, backend=f"{faulty.__name__}:Faulty", file=str(file), inputs=inputs)


def onnx_subject(inputs: str, name: str, *, n_layers: int = 1, gather: int = 0) -> Subject:
    """Layers of 64 × 64; then a Gather at the index ``gather``, which fails when it runs if that is beyond 63."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [64, 64], np.eye(64, dtype=np.float32).ravel())
    index = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    nodes = [helper.make_node("MatMul", [f"x{i}" if i else "x", "w"], [f"x{i + 1}"]) for i in range(n_layers)]
    # The index depends on the input, so that loading cannot fold it: x is 1, so 1 * gather.
    scale = helper.make_tensor("s", TensorProto.FLOAT, [1], [float(gather)])
    nodes += [
        helper.make_node("Gather", ["x", "i"], ["first"], axis=1),
        helper.make_node("Mul", ["first", "s"], ["scaled"]),
        helper.make_node("Cast", ["scaled"], ["where"], to=TensorProto.INT64),
        helper.make_node("Gather", [f"x{n_layers}", "where"], ["y"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight, index, scale],
    )
    file = Path(inputs).with_name(f"{name}.onnx")
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
    return Subject(name=name, backend="onnxruntime", file=str(file), inputs=inputs, session=SessionOptions(n_threads=1))


def is_running(pid: int) -> bool:
    """Whether there is such a process and it is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def ends_within(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_running(pid)


# --- real graphs ------------------------------------------------------------------------------------------


def test_graphs_are_timed_in_processes_of_their_own(inputs: str):
    long = onnx_subject(inputs, "long", n_layers=400)
    found = compare([long, onnx_subject(inputs, "short")], baseline="long", protocol=PROTOCOL)
    ratio = found.ratio("short")
    assert ratio is not None
    assert ratio.high < 1, "one layer is faster than four hundred"
    for measurement in found.measurements:
        assert measurement.failure is None
        assert measurement.n_threads == 1
        assert measurement.load_ms is not None
        assert measurement.load_ms > 0
        assert len(measurement.turns_ms) == len(measurement.waits_ms) >= 6
        assert all(len(turn) >= PROTOCOL.min_runs_per_turn for turn in measurement.turns_ms)
        assert all(ms > 0 for ms in measurement.samples_ms())
        assert measurement.warmup_ms
    assert found.environment.tools["onnxruntime"]


def test_a_graph_that_fails_only_when_it_runs_is_a_failure_of_that_graph(inputs: str):
    subjects = [onnx_subject(inputs, "float"), onnx_subject(inputs, "bad", gather=99)]
    found = compare(subjects, baseline="float", protocol=PROTOCOL)
    failure = found.measurement("bad").failure
    assert failure is not None
    assert "could not run the graph" in failure
    assert "\n" not in failure
    assert found.measurement("float").failure is None


def test_a_file_that_is_no_graph_is_a_failure_of_that_file(inputs: str, tmp_path: Path):
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    broken = Subject(name="broken", backend="onnxruntime", file=str(tmp_path / "broken.onnx"), inputs=inputs)
    gone = Subject(name="gone", backend="onnxruntime", file=str(tmp_path / "gone.onnx"), inputs=inputs)
    found = compare([onnx_subject(inputs, "float"), broken, gone], baseline="float", protocol=PROTOCOL)
    assert "refuses 'broken.onnx'" in (found.measurement("broken").failure or "")
    assert "gone.onnx" in (found.measurement("gone").failure or "")
    assert found.measurement("broken").load_ms is None


def test_workers_import_neither_torch_nor_onnx(inputs: str):
    """What a worker has loaded after a graph has run in it."""
    subject = onnx_subject(inputs, "float")
    requests = [
        {"type": "open", "backend": "onnxruntime", "file": subject.file, "inputs": inputs, "session": {}},
        {"type": "turn", "n_settle": 0, "block_ms": 1.0, "min_runs": 1, "max_runs": 2},
    ]
    code = (
        "import io, json, sys\n"
        "from edgevlm.measure import worker\n"
        "replies = io.BytesIO()\n"
        "worker.serve(sys.stdin.buffer, replies)\n"
        "kinds = [json.loads(reply)['type'] for reply in replies.getvalue().splitlines()]\n"
        "assert kinds == ['opened', 'ran'], replies.getvalue()\n"
        "print(json.dumps(sorted(name for name in sys.modules if '.' not in name)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    loaded = set(json.loads(result.stdout))
    assert "onnxruntime" in loaded
    assert not loaded & {"torch", "onnx", "onnxscript", "transformers", "nncf", "psutil", "matplotlib", "scipy"}


# --- bad days ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("crash", "Its process crashed (SIGSEGV)."),
        ("killed", "Its process was killed (SIGKILL): most likely the machine ran out of memory."),
        ("exit", "Its process ended with status 7. It said: terminate called after throwing"),
        ("raise", "ValueError: input zero point must be a scalar"),
    ],
)
def test_what_happens_to_a_worker_happens_to_its_subject_alone(inputs: str, what: str, words: str):
    subjects = [
        faulty_subject(inputs, "float", run_ms=1),
        faulty_subject(inputs, "bad", run_ms=1, what=what, at=8),  # 2 runs of warm-up, 4 in each turn: its second turn
        faulty_subject(inputs, "good", run_ms=1),
    ]
    found = compare(subjects, baseline="float", protocol=msgspec.structs.replace(PROTOCOL, warmup_ms=0.0, block_ms=0.0))
    bad = found.measurement("bad")
    assert bad.failure is not None
    assert bad.failure.startswith(words)
    assert "second line" not in bad.failure
    assert len(bad.turns_ms) == 1, "what was measured before is kept"
    assert found.ratio("bad") is None
    assert len(found.measurement("good").turns_ms) >= 6


def test_a_worker_that_is_refused_says_why(inputs: str):
    worker = ProcessWorker(faulty_subject(inputs, "bad", what="refuse"), PROTOCOL)
    try:
        with pytest.raises(WorkerError, match=r"^The graph has no nodes\.$"):
            worker.open()
    finally:
        worker.close()


def test_a_worker_that_hangs_is_stopped(inputs: str):
    worker = ProcessWorker(
        faulty_subject(inputs, "bad", what="hang", at=1), msgspec.structs.replace(PROTOCOL, timeout_s=1.0)
    )
    try:
        with pytest.raises(WorkerError, match="no answer for 1 s"):
            worker.open()  # may take longer on a busy machine; then that is what is stopped
            worker.warm_up()
    finally:
        worker.close()
    assert not is_running(worker.pid)


def test_what_a_library_prints_does_not_spoil_the_answers(inputs: str):
    worker = ProcessWorker(faulty_subject(inputs, "loud", talks=True), PROTOCOL)
    try:
        worker.open()
        assert len(worker.warm_up().samples_ms) >= 2
        assert len(worker.take_turn().samples_ms) >= PROTOCOL.min_runs_per_turn
    finally:
        worker.close()


@pytest.mark.parametrize(("long_run_s", "n_runs"), [(10.0, 3), (1e-4, 1)])
def test_a_long_run_is_a_turn_of_its_own(long_run_s: float, n_runs: int, inputs: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("edgevlm.measure.worker.LONG_RUN_S", long_run_s)
    subject = faulty_subject(inputs, "slow", run_ms=1.0)
    opened = OpenSubject(Open(**{name: getattr(subject, name) for name in ("backend", "file", "inputs", "session")}))
    assert len(opened.take_turn(Turn(n_settle=1, block_ms=0.0, min_runs=3, max_runs=9)).samples_ms) == n_runs
    assert len(opened.take_turn(Turn(n_settle=0, block_ms=0.0, min_runs=2, max_runs=9)).samples_ms) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak memory of a process")
def test_memory_is_what_the_graph_adds(inputs: str):
    found = compare(
        [faulty_subject(inputs, "float"), faulty_subject(inputs, "large", megabytes=64)],
        baseline="float",
        protocol=PROTOCOL,
    )
    small, large = found.measurement("float").memory_bytes, found.measurement("large").memory_bytes
    assert small is not None
    assert large is not None
    assert small < 16 << 20
    assert 60 << 20 < large - small < 80 << 20


# --- nothing is left behind -------------------------------------------------------------------------------

_PARENT = """
import json, sys
from edgevlm.measure.interleave import compare
from edgevlm.measure.protocol import QUICK
from edgevlm.measure.spec import Subject
import msgspec
subjects = msgspec.json.decode(sys.argv[1], type=list[Subject])
compare(subjects, baseline=subjects[0].name, protocol=QUICK)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see whether a process runs")
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(inputs: str, tmp_path: Path, sign: signal.Signals):
    """Ctrl-C, kill and kill -9 while one worker waits and the other one is in a run that lasts for minutes."""
    pid_files = [tmp_path / "float.pid", tmp_path / "hangs.pid"]
    subjects = [
        faulty_subject(inputs, "float", pid_file=str(pid_files[0])),
        faulty_subject(inputs, "hangs", pid_file=str(pid_files[1]), what="hang", at=1),
    ]
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, msgspec.json.encode(subjects).decode()],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 60
        while not all(file.exists() and file.read_text() for file in pid_files) and time.monotonic() < end:
            time.sleep(0.02)
        pids = [int(file.read_text()) for file in pid_files]
        assert all(is_running(pid) for pid in pids)
        if sign == signal.SIGINT:
            os.killpg(parent.pid, sign)  # as a terminal does: the parent and every worker
        else:
            parent.send_signal(sign)
        parent.wait(timeout=30)
        assert all(ends_within(pid, 10) for pid in pids)
    finally:
        parent.kill()
        _, errors = parent.communicate()
    if sign == signal.SIGINT:
        assert errors.count(b"KeyboardInterrupt") == 1, "only the parent speaks of it"


# --- settings ---------------------------------------------------------------------------------------------


def test_pools_stop_spinning_between_turns_unless_told_otherwise():
    assert options_for_turns("onnxruntime", SessionOptions()).entries == {"session.force_spinning_stop": "1"}
    for own in ({"session.force_spinning_stop": "0"}, {"session.intra_op.allow_spinning": "0"}):
        assert options_for_turns("onnxruntime", SessionOptions(entries=own)).entries == own
    assert options_for_turns("another", SessionOptions()) == SessionOptions()


def test_a_worker_opens_its_session_so(inputs: str):
    subject = onnx_subject(inputs, "float")
    opened = OpenSubject(
        Open(backend=subject.backend, file=subject.file, inputs=inputs, session=SessionOptions(n_threads=2))
    )
    settings = opened.session._session.get_session_options()  # type: ignore[attr-defined]
    assert settings.get_session_config_entry("session.force_spinning_stop") == "1"


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (Times(10_000, 0, 10_000, 10_000), 0),  # nothing disturbed it
        (Times(10_000, 4_000, 6_000, 6_000), 4_000),  # others had the CPU for 4 of 10 µs
        (Times(14_000, 4_000, 10_000, 10_000), 0),  # they had it before the run began
        (Times(10_000, 9_900, 6_000, 6_000), 4_000),  # no run takes less than the CPU time it used
        (Times(10_000, 4_000, 6_000, 9_000), 0),  # helper threads: nobody knows whose fault it was
    ],
)
def test_only_waits_that_others_caused_are_counted(after: Times, expected: int):
    assert wait_due_to_others(Times(0, 0, 0, 0), after, wall_ns=10_000) == expected


def test_a_comparison_of_processes_survives_being_written(inputs: str):
    found = compare([faulty_subject(inputs, "float")], baseline="float", protocol=PROTOCOL)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Comparison) == found


def test_subject_with_an_interpreter_of_its_own_runs_there(inputs: str, tmp_path: Path) -> None:
    """An environment without ONNX Runtime or edgevlm: the worker takes edgevlm from here and nothing else."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    shared = Path(
        subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    )
    for name in ("numpy", "numpy.libs", "msgspec"):
        if (source := Path(np.__file__).parents[1] / name).exists():
            (shared / name).symlink_to(source)
    subject = msgspec.structs.replace(onnx_subject(inputs, "elsewhere"), python=str(python))
    here = onnx_subject(inputs, "here")
    result = compare([here, subject], baseline="here", protocol=msgspec.structs.replace(PROTOCOL, n_rounds=2))
    assert result.measurement("elsewhere").failure == "ONNX Runtime is not installed."
    assert result.measurement("here").tools["onnxruntime"]
    faulty_elsewhere = msgspec.structs.replace(faulty_subject(inputs, "faulty"), python=str(python))
    worker = ProcessWorker(faulty_elsewhere, PROTOCOL)
    try:
        assert "numpy" in worker.open().tools
    finally:
        worker.close()
