"""The emulated device without an emulator: a Python of this machine stands in for the emulated one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
import pytest

import edgevlm
from edgevlm.devices import emulated, open_device
from edgevlm.devices.emulator import Emulator
from edgevlm.devices.errors import error_from
from edgevlm.errors import EdgeVLMError, MissingToolError, UsageError
from edgevlm.progress import silent
from edgevlm.runtime.bundle import open_bundle
from edgevlm.runtime.spec import Accuracy, BundleForm, to_json
from edgevlm.runtime.verify import Verification
from tests.runtime import tiny


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return tiny.make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def device(tmp_path: Path):
    """Runs what it is told with this machine's Python, in the environment of an emulated one but for its paths."""
    root = tmp_path / "emulator"
    root.mkdir()
    paths = ":".join([str(Path(edgevlm.__file__).parents[1]), *filter(None, sys.path)])
    script = f'#!/bin/sh\nunset PYTHONHOME PYTHONSAFEPATH\nPYTHONPATH="{paths}" exec {sys.executable} "$@"\n'
    (root / "python").write_text(script)
    (root / "python").chmod(0o755)
    source = emulated.link_source(tmp_path / "source")
    told = []
    made = emulated.EmulatedDevice(cpu="cortex-a76", emulator=Emulator(root=root), source=source, progress=told.append)
    return made, told


def refitted(bundle: Path, target: Path, change) -> Path:
    """A copy of a bundle with another manifest."""
    import shutil

    shutil.copytree(bundle, target)
    manifest = change(open_bundle(target).manifest)
    (target / "manifest.json").write_bytes(to_json(manifest))
    return target


def for_arch(arch: str | None):
    def change(manifest):
        requires = msgspec.structs.replace(manifest.requires, arch=arch)
        return msgspec.structs.replace(manifest, requires=requires)

    return change


# --- running a verb ---------------------------------------------------------------------------------------


def test_it_says_that_it_is_emulated(device):
    assert device[0].name == "cortex-a76 (emulated)"
    assert device[0].is_emulated


def test_a_verb_runs_there_and_its_json_comes_back(device, bundle):
    manifest = json.loads(device[0].run("inspect", bundle))
    assert manifest["name"] == "tiny"


def test_relative_paths_are_those_of_the_caller(device, bundle, monkeypatch):
    monkeypatch.chdir(bundle.parent)
    assert json.loads(device[0].run("inspect", Path(bundle.name)))["name"] == "tiny"


def test_a_verification_that_failed_is_an_answer(device, bundle, tmp_path):
    def tighten(manifest):
        golden = msgspec.structs.replace(manifest.golden, cases=())
        return msgspec.structs.replace(manifest, golden=golden)

    without = refitted(bundle, tmp_path / "without", tighten)
    found = msgspec.json.decode(device[0].run("verify", without), type=Verification)
    assert not found and "no golden vectors" in found.reasons[0]


def test_an_error_there_is_the_same_error_here(device, bundle):
    with pytest.raises(EdgeVLMError, match=r"On cortex-a76 \(emulated\): There is no picture '/no/such.png'") as caught:
        device[0].run("run", bundle, ["/no/such.png"])
    assert caught.value.exit_code == 1 and caught.value.hint
    with pytest.raises(UsageError, match="No such option"):
        device[0].run("inspect", bundle, ["--no-such"])


def test_what_it_says_meanwhile_is_progress(device):
    made, told = device
    with pytest.raises(EdgeVLMError, match="ended with exit code 1 after"):
        made.run_module("no_such_module")
    assert any("no_such_module" in event.detail for event in told)


@pytest.mark.parametrize(
    ("code", "said", "kind", "message"),
    [
        (3, ["error: It needs asimddp.", " hint: Take another."], MissingToolError, "On it: It needs asimddp."),
        (1, ["\x1b[31m\x1b[1merror: \x1b[0mIt is broken."], EdgeVLMError, "On it: It is broken."),
        (-11, ["loading"], EdgeVLMError, "On it the process ended with signal 11 after 'loading'."),
        (139, [], EdgeVLMError, "On it the process ended with exit code 139."),
    ],
)
def test_exit_codes_and_words_become_errors(code, said, kind, message):
    error = error_from(code, "\n".join(said), "it")
    assert type(error) is kind and error.message == message


# --- what may be emulated ---------------------------------------------------------------------------------


def test_a_bundle_that_names_no_architecture_may(bundle, tmp_path):
    emulated.check_can_emulate(open_bundle(bundle))
    emulated.check_can_emulate(open_bundle(refitted(bundle, tmp_path / "arm", for_arch("aarch64"))))


def test_a_bundle_for_x86_is_refused_before_anything_is_set_up(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(emulated, "prepare_emulator", lambda progress: pytest.fail("it was set up"))
    made = refitted(bundle, tmp_path / "x86", for_arch("x86-64"))
    with pytest.raises(MissingToolError, match=r"^The bundle 'tiny' is for x86-64, which no ARM processor can run\."):
        emulated.verify_emulated(made, "cortex-a53")


def for_backend(name: str):
    def change(manifest):
        parts = tuple(msgspec.structs.replace(part, backend=name) for part in manifest.components)
        return msgspec.structs.replace(manifest, components=parts)

    return change


def test_a_bundle_of_another_backend_is_refused(bundle, tmp_path):
    engines = open_bundle(refitted(bundle, tmp_path / "other", for_backend("tensorrt")))
    with pytest.raises(MissingToolError, match="needs tensorrt, which is not emulated here"):
        emulated.check_can_emulate(engines)


def test_instructions_are_counted_of_onnx_runtime_alone(bundle, tmp_path):
    from edgevlm.devices.instructions import count_instructions

    with pytest.raises(MissingToolError, match="needs openvino, which is not emulated here"):
        count_instructions(refitted(bundle, tmp_path / "other", for_backend("openvino")), "cortex-a76")


def with_form(name: str):
    """A second form, in another backend."""

    def change(manifest):
        accuracy = Accuracy(
            metric="accuracy",
            value=1.0,
            reference=1.0,
            drop=0.0,
            drop_low=0.0,
            drop_high=0.0,
            n=1,
            data="",
            has_labels=True,
        )
        own = BundleForm(
            name="fp32", components=manifest.components, requires=manifest.requires, golden=manifest.golden,
            accuracy=accuracy, judged_by="onnxruntime", recipe={},
        )  # fmt: skip
        other = msgspec.structs.replace(own, name="other", components=for_backend(name)(manifest).components)
        return msgspec.structs.replace(manifest, forms=(own, other))

    return change


def test_openvino_is_fetched_for_the_bundles_that_use_it(bundle, tmp_path, monkeypatch):
    there = Emulator(root=tmp_path)
    monkeypatch.setattr(emulated, "prepare_openvino", lambda progress: tmp_path / "openvino")
    plain, whole, form = (
        open_bundle(bundle),
        open_bundle(refitted(bundle, tmp_path / "whole", for_backend("openvino"))),
        open_bundle(refitted(bundle, tmp_path / "form", with_form("openvino"))),
    )
    assert emulated.with_backends(there, plain, silent) == there
    for each in (whole, form):
        found = emulated.with_backends(there, each, silent)
        assert found.environment("cortex-a76", tmp_path)["PYTHONPATH"].endswith(f":{tmp_path / 'openvino'}")


def test_where_openvino_cannot_be_had_only_what_needs_it_is_missing(bundle, tmp_path, monkeypatch):
    def unavailable(progress):
        raise MissingToolError("The emulator is unavailable: pip failed.", hint="Mend pip.")

    monkeypatch.setattr(emulated, "prepare_openvino", unavailable)
    there, told = Emulator(root=tmp_path), []
    form = open_bundle(refitted(bundle, tmp_path / "form", with_form("openvino")))
    assert emulated.with_backends(there, form, told.append) == there
    assert [event.text for event in told] == ["The emulator is unavailable: pip failed."]
    whole = open_bundle(refitted(bundle, tmp_path / "whole", for_backend("openvino")))
    with pytest.raises(MissingToolError, match="unavailable: pip failed"):
        emulated.with_backends(there, whole, silent)


def test_an_unknown_processor_is_refused_before_anything_is_set_up(monkeypatch):
    monkeypatch.setattr(emulated, "prepare_emulator", lambda progress: pytest.fail("it was set up"))
    with (
        pytest.raises(UsageError, match="'cortex-a75' is no processor") as caught,
        open_device("emulated://cortex-a75"),
    ):
        pass
    assert "cortex-a76" in caught.value.hint


def test_an_emulator_that_is_unavailable_hurts_nothing_else(bundle, monkeypatch, capsys):
    from edgevlm.cli.main import exit_code_of

    def unavailable(progress):
        raise MissingToolError("The emulator is unavailable: apt-get is not installed.", hint="Emulate on Debian.")

    monkeypatch.setattr(emulated, "prepare_emulator", unavailable)
    assert exit_code_of(["verify", str(bundle), "--emulate"]) == 3
    assert "unavailable: apt-get is not installed." in capsys.readouterr().err
    assert exit_code_of(["verify", str(bundle)]) == 0


MIRROR = "trixie main https://one.example"


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ({}, "dpkg is not installed"),
        ({"dpkg": "echo amd64"}, "apt-get is not installed"),
        ({"dpkg": "echo amd64", "apt-get": "echo"}, "this machine's apt has no mirror of Debian"),
        (
            {"dpkg": "echo amd64", "apt-get": f'[ "$1" = indextargets ] || exit 100; echo {MIRROR}'},
            "apt-get update of Debian's trixie failed (it said nothing)",
        ),
    ],
    ids=["no Debian", "no apt", "no mirror", "no network"],
)  # fmt: skip
def test_where_qemu_cannot_be_had_a_sentence_says_why(tools, reason, bundle, tmp_path, monkeypatch, capsys):
    from edgevlm.cli.main import exit_code_of

    (tmp_path / "bin").mkdir()
    for name, does in tools.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EDGEVLM_DEBIAN_MIRROR", raising=False)
    assert exit_code_of(["verify", str(bundle), "--emulate"]) == 3
    said = capsys.readouterr().err
    assert f"The emulator is unavailable: {reason}." in " ".join(said.split()) and "hint:" in said
    assert [left.name for left in (tmp_path / "cache/emulators").iterdir()] == [".lock"]
    assert exit_code_of(["verify", str(bundle)]) == 0


def test_the_processor_is_the_targets_or_a_cortex_a76(bundle, tmp_path):
    assert emulated.cpu_for(open_bundle(bundle)) == "cortex-a76"
    strange = refitted(bundle, tmp_path / "strange", lambda made: msgspec.structs.replace(made, target="my-board"))
    assert emulated.cpu_for(open_bundle(strange)) == "cortex-a76"


# --- what is said -----------------------------------------------------------------------------------------


def test_int8_vectors_from_a_processor_without_vnni_are_explained(bundle):
    manifest = open_bundle(bundle).manifest
    part = msgspec.structs.replace(manifest.components[0], precision="int8-static")

    def made_on(isa: str):
        golden = msgspec.structs.replace(manifest.golden, made_on={"arch": "x86-64", "isa": isa, "cpu": "Xeon"})
        return msgspec.structs.replace(manifest, components=(part,), golden=golden)

    assert "made on Xeon, which has no VNNI" in emulated.vnni_note(made_on("avx2 fma"))
    assert emulated.vnni_note(made_on("avx2 avx512_vnni")) == ""
    assert emulated.vnni_note(msgspec.structs.replace(made_on("avx2"), components=manifest.components)) == ""


def test_the_text_names_the_processor_the_errors_and_the_tolerance(device, bundle):
    found = msgspec.json.decode(device[0].run("verify", bundle), type=Verification)
    shown = emulated.EmulatedVerification(device=device[0].name, verification=found)
    assert shown
    text = shown.to_text()
    assert text.startswith("On cortex-a76 (emulated): ") and "Nothing here says how fast it is." in text
    for case in found.cases:
        assert f"{case.picture}: same answer, outputs equal to the bit ({found.tolerance:.2g} allowed)" in text
