"""Targets are data: read strictly, written back to the same value, and honest about where they can be measured."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgevlm import targets
from edgevlm.cli.main import exit_code_of
from edgevlm.data_files import data_folder
from edgevlm.errors import EdgeVLMError, MissingToolError, ModelError, UsageError
from edgevlm.measure.peak import Peak, Rate
from edgevlm.runtime.backends import load_backend
from edgevlm.runtime.machine import describe_machine
from edgevlm.target import (
    Target,
    host_target,
    load_target,
    missing_backends,
    pick_backends,
    read_target,
    target_names,
    target_text,
    why_not_at_hand,
)

MACHINE = describe_machine()


@pytest.mark.parametrize("name", target_names())
def test_every_built_in_target_is_valid_and_says_where_its_facts_come_from(name):
    target = read_target(name)
    assert target.sources
    assert load_target(name).arch != "host"


def test_what_differs_between_modules_of_one_name_is_left_open():
    assert read_target("jetson-agx-orin").n_cores == 0  # 8 with 32 GB, 12 with 64 GB
    assert read_target("jetson-orin-nano").n_cores == 6


def test_a_target_with_unknown_words_is_refused_with_the_nearest(tmp_path):
    file = tmp_path / "board.toml"
    file.write_text('name = "board"\ndescription = ""\narch = "x86-64"\nactivation_sing = "u8"\n')
    with pytest.raises(UsageError) as caught:
        load_target(str(file))
    assert "activation_sign" in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('backends = ["onnxruntimes"]', "onnxruntimes"),
        ('precisions = ["int8"]', "fp32"),
        ("opset = 9", "opset"),
        ("n_cores = -1", "negative"),
        ('n_cores = "two"', "n_cores"),
        ("name = 3", "TOML"),
        ("peaks = { int8_tops = 4.0 }", "peaks"),
        ("peaks = { int8_gmac_per_s = 0.0 }", "peaks"),
    ],
)
def test_wrong_values_are_named(tmp_path, line, word):
    file = tmp_path / "board.toml"
    file.write_text(f'name = "board"\ndescription = ""\narch = "x86-64"\n{line}\n')
    with pytest.raises(UsageError, match=word):
        targets.validate(str(file))


def test_an_unknown_target_gets_the_nearest():
    with pytest.raises(UsageError) as caught:
        load_target("x86-64-avx512-vni")
    assert "x86-64-avx512-vnni" in caught.value.hint


names = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), min_size=1, max_size=20)


@given(
    description=names,
    isa=st.lists(names, max_size=3),
    sources=st.dictionaries(names, names, max_size=3),
    n=st.integers(0, 512),
)
def test_text_and_value_are_inverses(tmp_path_factory, description, isa, sources, n):
    target = Target(name="board", description=description, arch="x86-64", isa=tuple(isa), n_cores=n, sources=sources)
    file = tmp_path_factory.mktemp("target") / "board.toml"
    file.write_text(target_text(target), encoding="utf-8")
    assert read_target(str(file)) == target


def test_the_host_can_be_detected_written_and_used(tmp_path):
    file = tmp_path / "board.toml"
    written = targets.detect(file, is_measured=False)
    assert load_target(str(file)) == written and not written.peaks
    assert why_not_at_hand(written, MACHINE) == ""
    with pytest.raises(EdgeVLMError, match="exists already"):
        targets.detect(file)


def peak_of(backend, *, int8, is_valid=True):
    probe = "MatMul 256×512×512"
    rates = [Rate(precision=p, gmac_per_s=v, probe=probe, by_probe={}) for p, v in (("float32", 50.0), ("int8", int8))]
    return Peak(
        backend=backend, version="1.0", n_threads=2, rates=tuple(rates), bandwidth_gb_per_s=30.04, disagreement=0.0,
        is_valid=is_valid, machine="board",
    )  # fmt: skip


def test_the_rates_of_a_detected_target_are_the_best_of_its_backends(monkeypatch, tmp_path):
    found = {"onnxruntime": peak_of("onnxruntime", int8=200.0), "openvino": peak_of("openvino", int8=210.0)}
    monkeypatch.setattr("edgevlm.measure.peak.measure_peak", lambda *, backend: found[backend])
    backends = [name for name in found if load_backend(name).version()]
    target = targets.with_peaks(host_target(MACHINE, name="board"))
    best = max(found[name].rates[1].gmac_per_s for name in backends)
    assert target.peaks == {"float32_gmac_per_s": 50.0, "int8_gmac_per_s": best, "bandwidth_gb_per_s": 30.0}
    assert "onnxruntime 1.0, 2 threads" in target.sources["peaks.float32_gmac_per_s"]
    file = tmp_path / "board.toml"
    file.write_text(target_text(target), encoding="utf-8")
    assert read_target(str(file)) == target


def test_rates_that_a_busy_machine_gave_are_called_so(monkeypatch):
    monkeypatch.setattr(
        "edgevlm.measure.peak.measure_peak", lambda *, backend: peak_of(backend, int8=9.0, is_valid=False)
    )
    target = targets.with_peaks(host_target(MACHINE, name="board"))
    assert all("too low" in words for key, words in target.sources.items() if key.startswith("peaks."))


def test_rates_that_cannot_be_measured_are_left_out_with_the_reason(monkeypatch):
    def fails(*, backend):
        raise ModelError(f"The peak of {backend} could not be measured: it is gone")

    monkeypatch.setattr("edgevlm.measure.peak.measure_peak", fails)
    target = targets.with_peaks(host_target(MACHINE, name="board"))
    assert target.peaks == {} and "could not be measured" in target.sources["peaks"]


def test_another_machine_is_told_apart():
    other = "aarch64" if MACHINE.arch == "x86-64" else "x86-64"
    host = host_target(MACHINE, name="host")
    assert other in why_not_at_hand(msgspec.structs.replace(host, arch=other, isa=()), MACHINE)
    assert "lacks amx_none" in why_not_at_hand(msgspec.structs.replace(host, isa=(*host.isa, "amx_none")), MACHINE)
    without = msgspec.structs.replace(host, isa=())
    if MACHINE.isa:
        assert why_not_at_hand(without, msgspec.structs.replace(MACHINE, is_isa_known=False)) == ""


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        ('arch = "aarch64"\nisa = ["asimd", "avx2"]', "no aarch64 has avx2"),
        ('arch = "x86-64"\nisa = ["asimddp"]', "no x86-64 has asimddp"),
        ('arch = "x86-64"\nopset = 21\nonnx_ir = 9', "opset 21 needs 10"),
        ('arch = "x86-64"\n[runtimes]\nopenvino = "2026.4"', "openvino is not among the backends"),
        ('arch = "x86-64"\ncompute_capability = "sm_89"', "not like 8.7"),
        ('arch = "armv7"', "'armv7', which is no architecture"),
        ('arch = "host"\nn_cores = 2\nactivation_sign = "s8"', "says n_cores, activation_sign, but with arch"),
        ('arch = "x86-64"\nemulated_as = "cortex-a76"', "aarch64 processors alone are emulated"),
        ('arch = "aarch64"\nemulated_as = "cortex-a67"', "'cortex-a67' is no processor that can be emulated"),
        ('arch = "x86-64"\nbackends = ["tensorrt"]\ncompute_capability = "9.0"', "signed bytes alone"),
    ],
)
def test_a_target_that_contradicts_itself_is_refused(tmp_path, lines, word):
    file = tmp_path / "board.toml"
    file.write_text(f'name = "board"\ndescription = ""\n{lines}\n')
    with pytest.raises(UsageError, match=word):
        targets.validate(str(file))


@pytest.mark.parametrize("name", target_names())
def test_a_right_target_is_right_whatever_is_installed_here(name, monkeypatch, capsys):
    for backend in ("onnxruntime.OnnxRuntime", "openvino.OpenVino", "tensorrt.TensorRt"):
        monkeypatch.setattr(f"edgevlm.runtime.backends.{backend}.version", lambda self: None)
    file = str(data_folder("targets") / f"{name}.toml")
    assert exit_code_of(["targets", "validate", file]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{file}: ok (")
    assert all(f"\n{backend}: unavailable: " in said for backend in load_target(name).backends)


def test_a_backend_must_exist_and_suit_the_target():
    host = host_target(MACHINE, name="host")
    assert pick_backends(host, ()) == tuple(name for name in host.backends if name not in missing_backends(host))
    assert pick_backends(host, ("onnxruntime",)) == ("onnxruntime",)
    with pytest.raises(UsageError, match="no backend"):
        pick_backends(host, ("onyxruntime",))


@pytest.mark.parametrize("arch", ["x86-64", "aarch64"])
def test_a_backend_that_is_not_installed_is_left_out_unless_it_is_asked_for(arch, monkeypatch):
    host = host_target(msgspec.structs.replace(MACHINE, arch=arch, isa=()), name="host")
    monkeypatch.setattr("edgevlm.runtime.backends.openvino.OpenVino.version", lambda self: None)
    assert host.backends == ("onnxruntime", "openvino")
    assert pick_backends(host, ()) == ("onnxruntime",)
    assert missing_backends(host) == {"openvino": "pip install 'edgevlm[openvino]'"}
    with pytest.raises(MissingToolError) as caught:
        pick_backends(host, ("openvino",))
    assert caught.value.hint == "Run: pip install 'edgevlm[openvino]'"


def test_doctor_notes_a_missing_extra_and_calls_only_a_missing_base_broken(monkeypatch):
    from edgevlm.diagnosis import doctor, is_healthy

    monkeypatch.setattr("edgevlm.runtime.backends.openvino.OpenVino.version", lambda self: None)
    (check,) = (each for each in doctor() if each.name == "backend openvino")
    assert (check.state, check.remedy) == ("note", "pip install 'edgevlm[openvino]'")
    assert is_healthy((check,))
    monkeypatch.setattr("edgevlm.runtime.backends.onnxruntime.OnnxRuntime.version", lambda self: None)
    assert not is_healthy(doctor())
