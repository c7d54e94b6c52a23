"""A stand-in for ``trtexec``: a program that takes the documented options and prints and writes the documented formats.

Its engines are ONNX graphs, run by ONNX Runtime; the stand-in for the Python module opens them too. It refuses options
that the version it plays does not have, inputs of another size than the shapes say, and shapes for fixed inputs. What
TensorRT itself does it does not show.

Source of the formats: NVIDIA/TensorRT, samples/trtexec/trtexec.cpp and samples/common (sampleDevice.cpp,
sampleOptions.cpp, sampleReporting.cpp, sampleUtils.cpp, logging.h).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MARK = "engine:"
FUSED = "Conv_0 + Relu_1"
LAYERS = [
    {
        "Name": FUSED,
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Dimensions": [1, 3, 16, 16], "Format/Datatype": "Row major linear Int8 format"}],
        "Outputs": [{"Name": "y", "Dimensions": [1, 8, 16, 16], "Format/Datatype": "Row major linear FP16 format"}],
        "ParameterType": "Convolution",
        "Weights": {"Type": "Int8", "Count": 216},
    },
    {
        "Name": "MatMul_9",
        "LayerType": "gemm",
        "Inputs": [{"Name": "y", "Dimensions": [1, 8], "Format/Datatype": "Half"}],
        "Outputs": [{"Name": "logits", "Dimensions": [1, 10], "Format/Datatype": "Half"}],
    },
    "Reshape_4",
]
TIMES = {FUSED: 0.75, "MatMul_9": 0.25}


def save_trtexec(folder: Path, **plays: Any) -> Path:
    """Write the program into a folder; ``plays`` are the settings that stand on top of it."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "trtexec"
    settings = {
        "banner": "[TensorRT v100300] [b26]", "is_typed": True, "gpu": "8.7", "fails": "", "adds": 0.0,
        "log": str(folder / "calls.jsonl"), "layers": LAYERS, "times": TIMES, **plays,
    }  # fmt: skip
    program.write_text(f"#!{sys.executable}\nPLAYS = {settings!r}\n{_PROGRAM}", encoding="utf-8")
    program.chmod(0o755)
    return program


def calls_of(program: Path) -> list[list[str]]:
    """The arguments that it was started with, but for those that asked for help."""
    log = program.with_name("calls.jsonl")
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return [call for call in map(json.loads, lines) if call != ["--help"]]


_PROGRAM = r"""
import json
import sys
import time

ARGUMENTS = sys.argv[1:]
KNOWN = {
    "--onnx", "--saveEngine", "--skipInference", "--profilingVerbosity", "--builderOptimizationLevel", "--memPoolSize",
    "--hardwareCompatibilityLevel", "--minShapes", "--optShapes", "--maxShapes", "--loadEngine", "--loadInputs",
    "--shapes", "--iterations", "--warmUp", "--duration", "--exportOutput", "--dumpProfile", "--separateProfileRun",
    "--exportProfile", "--exportLayerInfo", "--timingCacheFile", "--help",
    *(["--stronglyTyped"] if PLAYS["is_typed"] else []),
}
OPTIONS = dict(each.partition("=")[::2] for each in ARGUMENTS)


def say(level, words):
    print(f"[11/24/2026-20:00:00] [{level}] {words}", file=sys.stdout if level in "IV" else sys.stderr, flush=True)


def end(code, word):
    print(f"&&&& {word} TensorRT.trtexec {PLAYS['banner']} # trtexec {' '.join(ARGUMENTS)}", flush=True)
    sys.exit(code)


def fail(*words):
    for each in words:
        say("E", each)
    end(1, "FAILED")


def pairs(text):
    return [(name.strip("'"), value) for name, _, value in (each.rpartition(":") for each in text.split(","))]


def sizes(text):
    return {name: [int(size) for size in value.split("x")] for name, value in pairs(text)} if text else {}


def show_device():
    say("I", "=== Device Information ===")
    if not PLAYS["gpu"]:
        say("E", "Cuda failure: no CUDA-capable device is detected")
        sys.exit(1)
    say("I", 'Available Devices: ')
    say("I", '  Device 0: "Orin" UUID: GPU-f5507ee1-b6b1-556b-8350-83af993dbffd')
    say("I", "Selected Device: Orin")
    say("I", "Selected Device ID: 0")
    if PLAYS["fails"] != "no capability":
        say("I", f"Compute Capability: {PLAYS['gpu']}")
    say("I", "SMs: 8")
    say("I", "")


def has_free_sizes():
    import onnxruntime as ort

    session = ort.InferenceSession(OPTIONS["--onnx"], as_written(), providers=["CPUExecutionProvider"])
    return any(not isinstance(size, int) for each in session.get_inputs() for size in each.shape)


def as_written():
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    return settings


def build():
    if "--minShapes" in OPTIONS and not has_free_sizes():
        fail("Static model does not take explicit shapes since the shape of inference tensors will be determined by "
             "the model itself", "Network And Config setup failed", "Building engine failed",
             "Failed to create engine from model or file.", "Engine set up failed")
    if PLAYS["fails"] == "node":
        say("E", '[TRT] ModelImporter.cpp:949: While parsing node number 3 [Col2Im -> "unfolded"]:')
        say("E", "[TRT] ModelImporter.cpp:950: --- Begin node ---")
        print('input: "cols"\noutput: "unfolded"\nname: "/head/fold"\nop_type: "Col2Im"\n', file=sys.stderr, flush=True)
        say("E", "[TRT] ModelImporter.cpp:951: --- End node ---")
        say("E", "[TRT] ModelImporter.cpp:953: ERROR: onnxOpCheckers.cpp:780 In function checkFallbackPluginImporter: "
                 "[6] Plugin not found, are the plugin name, version, and namespace correct?")
        fail("Failed to parse onnx file", "Parsing model failed", "Failed to create engine from model or file.",
             "Engine set up failed")
    if PLAYS["fails"] == "build":
        fail("[TRT] [optimizer.cpp::computeCosts::4048] Error Code 10: Internal Error "
             "(Could not find any implementation for node {ForeignNode[Conv_0]}.)",
             "Engine could not be created from network", "Building engine failed",
             "Failed to create engine from model or file.", "Engine set up failed")
    if PLAYS["fails"] == "disk":
        with open(OPTIONS["--saveEngine"], "wb") as file:
            file.write(b"engi")
        fail("Saving engine to file failed.", "Engine set up failed")
    if PLAYS["fails"] == "crash":
        import os, signal
        os.kill(os.getpid(), signal.SIGSEGV)
    if PLAYS["fails"] == "nothing":
        end(0, "PASSED")
    with open(OPTIONS["--onnx"], "rb") as graph, open(OPTIONS["--saveEngine"], "wb") as file:
        file.write(b"engine:" + graph.read())
    if "--timingCacheFile" in OPTIONS:
        with open(OPTIONS["--timingCacheFile"], "ab") as file:
            file.write(b"timed")
    say("I", "Skipped inference phase since --skipInference is added.")
    end(0, "PASSED")


def load():
    import numpy as np
    import onnxruntime as ort

    with open(OPTIONS["--loadEngine"], "rb") as file:
        data = file.read()
    if not data.startswith(b"engine:"):
        fail("[TRT] IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion "
             "stdVersionRead == kSERIALIZATION_VERSION failed.Version tag does not match.)", "Engine set up failed")
    session = ort.InferenceSession(data[7:], as_written(), providers=["CPUExecutionProvider"])
    given, files = sizes(OPTIONS.get("--shapes", "")), dict(pairs(OPTIONS["--loadInputs"]))
    kinds = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}
    feeds = {}
    for each in session.get_inputs():
        is_fixed = all(isinstance(size, int) for size in each.shape)
        if is_fixed == (each.name in given):
            fail(f"The shape of {each.name} is {'fixed' if is_fixed else 'free'}", "Inference set up failed")
        shape = each.shape if is_fixed else given[each.name]
        value = np.fromfile(files.pop(each.name), kinds[each.type])
        if value.size != np.prod(shape):
            fail(f"Unexpected file size for input file: {each.name}.", "Inference set up failed")
        feeds[each.name] = value.reshape(shape)
    if files:
        fail(f"Cannot find input tensor with name {min(files)}", "Inference set up failed")
    if PLAYS["fails"] == "run":
        fail("[TRT] IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime "
             "(an illegal memory access was encountered)",
             "Error occurred during inference")
    names = [each.name for each in session.get_outputs()]
    if "--exportOutput" in OPTIONS:
        with open(OPTIONS["--exportOutput"], "w") as file:
            write_answers(file, zip(names, session.run(names, feeds)))
    if "--exportProfile" in OPTIONS:
        assert "--separateProfileRun" in OPTIONS
        with open(OPTIONS["--exportProfile"], "w") as file:
            total = sum(PLAYS["times"].values())
            n = int(OPTIONS["--iterations"])
            file.write(f'[\n  {{ "count" : {n} }}\n')
            for name, ms in PLAYS["times"].items():
                file.write(f', {{ "name" : "{name}", "timeMs" : {n * ms:.6g}, "averageMs" : {ms * 2:.6g}, '
                           f'"medianMs" : {ms:.6g}, "percentage" : {ms / total * 100:.6g} }}\n')
            file.write("]\n")
    if "--exportLayerInfo" in OPTIONS:
        with open(OPTIONS["--exportLayerInfo"], "w") as file:
            file.write(json.dumps({"Layers": PLAYS["layers"], "Bindings": names}) if PLAYS["layers"] else "")
    end(0, "PASSED")


def write_answers(file, tensors):
    file.write("[\n")
    sep = "  "
    for name, value in tensors:
        if PLAYS["fails"] == "names":
            name = f"{name}_1"
        flat = value.ravel() + float(PLAYS["adds"])
        numbers = ", ".join(f"{each:.6g}" for each in flat)
        file.write(f'{sep}{{ "name" : "{name}"\n  , "dimensions" : "{"x".join(map(str, value.shape))}"\n'
                   f'  , "values" : [ {numbers} ]\n  }}\n')
        sep = ", "
    file.write("]\n")


with open(PLAYS["log"], "a") as log:
    log.write(json.dumps(ARGUMENTS) + "\n")
print(f"&&&& RUNNING TensorRT.trtexec {PLAYS['banner']} # trtexec {' '.join(ARGUMENTS)}", flush=True)
if "--help" in ARGUMENTS:
    for option in sorted(KNOWN):
        print(f"  {option}    What it does.")
    sys.exit(0)
for option in OPTIONS:
    if option not in KNOWN:
        fail(f"Unknown option: {option} {OPTIONS[option]}")
if PLAYS["fails"] == "hangs":
    time.sleep(600)
show_device()
build() if "--onnx" in OPTIONS else load()
"""
