"""A device over SSH, for real: an OpenSSH server on loopback."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from edgevlm.bundle.write import write_bundle
from edgevlm.cli.main import exit_code_of
from edgevlm.devices import open_device, ssh
from edgevlm.devices.ssh import SshDevice, open_ssh
from edgevlm.devices.verbs import benchmark_on, verify_on
from edgevlm.errors import BundleError, DataError, EdgeVLMError, MissingToolError, StoreError, UsageError
from edgevlm.measure.bundles import WHOLE
from edgevlm.progress import Event, Note, StepProgress, StepStarted
from edgevlm.runtime.bundle import open_bundle
from edgevlm.runtime.verify import verify_bundle
from tests.devices.server import Server, python_that, script
from tests.runtime import tiny

HOSTILE = ("-rf", "line\nfeed", 'two words, it\'s "quoted" $(touch hacked) `touch hacked`; touch hacked # é*?')


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny.make_bundle(tmp_path / "tiny")


# --- what it is for -----------------------------------------------------------------------------------------


def test_verify_gives_what_it_gives_here_and_a_second_time_nothing_is_pushed(server: Server, bundle: Path, capsys):
    assert exit_code_of(["verify", str(bundle), "--device", server.address(), "--json"]) == 0
    printed, told = capsys.readouterr()
    assert json.loads(printed) == json.loads(msgspec.json.encode(verify_bundle(bundle)))
    assert "push edgevlm to" in told
    assert f"push '{bundle}' to" in told
    trees = server.trees()
    assert {tree.parts[0] for tree in trees} == {"runtime", "bundles"}

    assert exit_code_of(["verify", str(bundle), "--device", server.address()]) == 0
    printed, told = capsys.readouterr()
    assert printed.startswith(f"on {server.name}:\n8 files")
    assert "push" not in told
    assert server.trees() == trees
    assert not server.leftovers()


def test_benchmark_times_bundles_there_under_the_names_they_have_here(server: Server, bundle: Path, tmp_path: Path):
    other = tiny.make_bundle(tmp_path / "batch of 2", batch="rows")
    events: list[Event] = []
    with open_device(server.address(), progress=events.append) as device:
        found = benchmark_on(device, [bundle, other], n_threads=1, n_rounds=6)
    assert found.bundles == (str(bundle), str(other))
    assert [each.subject for each in found.comparisons[WHOLE].measurements] == [str(bundle), str(other)]
    assert all(each.failure is None for each in found.comparisons[WHOLE].measurements)
    assert found.environment.tools["onnxruntime"]
    details = [event.detail for event in events if isinstance(event, StepProgress)]
    assert any("round 6 of 6" in detail for detail in details)
    assert not any(str(server.cache) in detail for detail in details), "paths of the device are not for the user"
    assert any(isinstance(event, Note) and "takes" in event.text for event in events)
    pushed = [each.name for each in events if isinstance(each, StepStarted) and each.name.startswith("push")]
    assert len(pushed) == len(set(pushed)) == 3, "edgevlm and two bundles, though each is verified before it is timed"


def test_an_archive_is_what_its_folder_is(server: Server, bundle: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path / "cache"))
    write_bundle(tmp_path / "packed.evlm", open_bundle(bundle).manifest, _files_of(bundle))
    with open_ssh(server.address()) as device:
        assert verify_on(device, bundle)
        trees = server.trees()
        assert verify_on(device, tmp_path / "packed.evlm")
    assert server.trees() == trees


def _files_of(bundle: Path) -> dict[str, bytes]:
    return {entry.path: (bundle / entry.path).read_bytes() for entry in open_bundle(bundle).manifest.files}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_reaches_a_shell(server: Server, tmp_path: Path, name: str, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.make_bundle(tmp_path / name)
    python = python_that(server.folder / name)
    with open_ssh(server.address(python=python) if name.isprintable() else server.address()) as device:
        assert verify_on(device, Path(name))
        with pytest.raises(UsageError) as caught:
            device.run("benchmark", Path(name), ["--threads", name])
    assert f"On {server.name}: Invalid value for '--threads'" in caught.value.message
    found = {path.name for folder in (tmp_path, server.folder, Path.home()) for path in folder.iterdir()}
    assert "hacked" not in found


def test_what_a_verb_writes_comes_back(server: Server, bundle: Path, tmp_path: Path, monkeypatch):
    _stand_in(monkeypatch, server, "folder = Path(sys.argv[-1]); (folder / 'a' / 'b').mkdir(parents=True)",
              "(folder / 'a' / 'b' / 'file').write_bytes(bytes(range(256)) * 1000); print('{}')")  # fmt: skip
    with open_ssh(server.address()) as device:
        assert device.run("tune", bundle, output=tmp_path / "out" / "put") == b"{}\n"
        with pytest.raises(StoreError, match="cannot be written"):
            device.run("tune", bundle, output=tmp_path / "out" / "put")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["put"]
    assert (tmp_path / "out" / "put" / "a" / "b" / "file").read_bytes() == bytes(range(256)) * 1000
    assert not server.leftovers()


def test_what_did_not_come_back_whole_is_not_there(server: Server, bundle: Path, tmp_path: Path, monkeypatch):
    """Cut between two files, where an archive looks as if it had ended."""
    _stand_in(monkeypatch, server, "folder = Path(sys.argv[-1]); folder.mkdir(); (folder / 'a').touch(); print('{}')")
    with open_ssh(server.address()) as device:
        added = 'archive.add(output, arcname="output")'
        assert added in device._connection._source
        cut = f"{added}; sys.stdout.buffer.flush(); os._exit(1)"
        device._connection._source = device._connection._source.replace(added, cut)
        with pytest.raises(EdgeVLMError):
            device.run("tune", bundle, output=tmp_path / "results" / "out")
    assert not list((tmp_path / "results").iterdir())


def test_an_interpreter_in_the_users_home(server: Server):
    python = python_that(server.folder / "my python")
    with open_ssh(server.address(python="~/" + os.path.relpath(python, Path.home()))):
        pass


def test_what_would_lead_out_of_the_output_is_refused(server: Server, bundle: Path, tmp_path: Path, monkeypatch):
    _stand_in(monkeypatch, server, "folder = Path(sys.argv[-1]); folder.mkdir()",
              "(folder / 'link').symlink_to('/etc/passwd'); print('{}')")  # fmt: skip
    with open_ssh(server.address()) as device, pytest.raises(EdgeVLMError, match="no plain file"):
        device.run("tune", bundle, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _stand_in(monkeypatch, server: Server, *lines: str) -> None:
    """Another edgevlm is pushed: one that does this."""
    package = server.folder / "stand-in"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("\n".join(("import os, sys, time", "from pathlib import Path", *lines, "")))
    monkeypatch.setattr("edgevlm.devices.trees.edgevlm", type("", (), {"__file__": str(package / "__init__.py")}))


# --- errors of the verb -------------------------------------------------------------------------------------


def test_a_verbs_error_there_is_the_same_error_here(server: Server, bundle: Path):
    with open_ssh(server.address()) as device:
        with pytest.raises(UsageError) as caught:
            device.run("benchmark", bundle, ["--rounds", "1"])
        assert caught.value.message.startswith(f"On {server.name}: Invalid value for '--rounds'")
        assert caught.value.hint.startswith("See: ")
        with pytest.raises(UsageError, match="no verb 'verfy'"):
            device.run("verfy", bundle)


@pytest.mark.parametrize(
    ("line", "exit_code", "words"),
    [
        ("sys.stderr.write('error: It is.\\n hint: Mend it.\\n'); sys.exit(4)", 4, "It is."),
        ("sys.exit('nothing that we know')", 1, "exit code 1 after 'nothing that we know'"),
        ("os.kill(os.getpid(), 9)", 1, "its memory is full"),
    ],
)
def test_however_a_verb_ends_there_is_a_sentence(server, bundle, monkeypatch, line: str, exit_code: int, words: str):
    _stand_in(monkeypatch, server, line)
    with open_ssh(server.address()) as device, pytest.raises(EdgeVLMError) as caught:
        device.run("verify", bundle)
    assert caught.value.exit_code == exit_code
    assert words in caught.value.message
    assert caught.value.hint


def test_a_bundle_that_answers_otherwise_is_no_error_but_a_verdict(
    server: Server, bundle: Path, tmp_path: Path, capsys
):
    wrong = _wrong(bundle, tmp_path / "wrong")
    assert exit_code_of(["verify", str(wrong), "--device", server.address()]) == 1
    assert "got another answer" in capsys.readouterr().out


def test_a_bundle_that_answers_otherwise_is_not_timed(server: Server, bundle: Path, tmp_path: Path):
    wrong = _wrong(bundle, tmp_path / "wrong")
    events: list[Event] = []
    with (
        open_device(server.address(), progress=events.append) as device,
        pytest.raises(
            BundleError, match=f"does not answer as it should on {server.name}, so nothing was timed: .*golden/0.png"
        ),
    ):
        benchmark_on(device, [bundle, wrong], n_threads=1, n_rounds=6)
    steps = {event.name for event in events if isinstance(event, StepStarted)}
    assert f"verify on {server.name}" in steps and f"benchmark on {server.name}" not in steps


def _wrong(bundle: Path, place: Path) -> Path:
    """The bundle with the answer to one picture as that to another."""
    manifest = open_bundle(bundle).manifest
    case = msgspec.structs.replace(manifest.golden.cases[0], answer=manifest.golden.cases[1].answer)
    golden = msgspec.structs.replace(manifest.golden, cases=(case,))
    write_bundle(place, msgspec.structs.replace(manifest, golden=golden), _files_of(bundle))
    return place


def test_a_damaged_bundle_is_not_pushed(server: Server, bundle: Path):
    graph = bundle / "components" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    with open_ssh(server.address()) as device, pytest.raises(BundleError, match="was changed"):
        verify_on(device, bundle)
    assert not server.trees()


def test_a_bundle_for_another_architecture_is_not_pushed(server: Server, bundle: Path, tmp_path: Path):
    manifest = open_bundle(bundle).manifest
    requires = msgspec.structs.replace(manifest.requires, arch="riscv64")
    write_bundle(tmp_path / "other", msgspec.structs.replace(manifest, requires=requires), _files_of(bundle))
    with open_ssh(server.address()) as device, pytest.raises(MissingToolError, match="is for riscv64, but"):
        verify_on(device, tmp_path / "other")
    assert not server.trees()


def test_two_names_of_the_same_files_are_refused(server: Server, bundle: Path, tmp_path: Path):
    shutil.copytree(bundle, tmp_path / "copy")
    with open_ssh(server.address()) as device, pytest.raises(UsageError, match="hold the same files"):
        benchmark_on(device, [bundle, tmp_path / "copy"])


def refused(address: str, words: str) -> MissingToolError:
    """The error with which a device does not open."""
    with pytest.raises(MissingToolError, match=words) as caught, open_ssh(address):
        pass
    return caught.value


# --- what the device lacks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["echo 'Python 2.7.18' >&2; exit 1"], "does not run"),
        (['exec python3 -c "import sys; sys.version_info = (3, 8, 10); exec(sys.argv[1])" "$2"'], "has Python 3.8.10"),
    ],
)
def test_an_old_or_broken_python_is_named(server: Server, lines: list[str], words: str):
    python = script(server.folder / "python", *lines)
    error = refused(server.address(python=python), words)
    assert str(python) in error.message
    assert "?python=" in error.hint


def test_a_missing_python_is_named(server: Server):
    address = server.address(python="/no such/python3")
    error = refused(address, "'/no such/python3' does not run on")
    assert "3.10 or newer" in error.hint


def test_missing_libraries_are_named_with_the_command_that_installs_them(server: Server):
    python = script(server.folder / "python", f'exec {shlex.quote(sys.executable)} -S "$@"')
    error = refused(server.address(python=python), r"lacks .*numpy>=1\.26, onnxruntime>=")
    assert "-m pip install 'click>=" in error.hint


# --- a full disk --------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_there_leaves_nothing(server: Server, bundle: Path):
    python = python_that(server.folder / "python", "ulimit -f 20")  # blocks of 512 bytes, in some shells of 1024
    with open_ssh(server.address(python=python)) as device, pytest.raises(StoreError, match="File too large") as caught:
        verify_on(device, bundle)
    assert "EDGEVLM_CACHE" in caught.value.hint
    assert not server.trees()
    assert not server.leftovers()


def test_a_disk_that_is_full_by_the_time_it_is_written(server: Server, bundle: Path, monkeypatch):
    """It has room when it is asked, and none when the files come."""
    mount = f"mount -t tmpfs -o size=200k none {shlex.quote(str(server.cache))}"
    server.cache.mkdir()
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*inside, mount], capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    command = [*inside, f'{mount}; exec "$@"', "sh", sys.executable]
    python = script(server.folder / "python", f'exec {shlex.join(command)} "$@"')
    _with_free_bytes(monkeypatch, 1 << 40)
    with open_ssh(server.address(python=python)) as device, pytest.raises(StoreError, match="No space left on device"):
        verify_on(device, bundle)


def test_too_little_room_is_known_before_anything_is_pushed(server: Server, bundle: Path, monkeypatch):
    _with_free_bytes(monkeypatch, 1000)
    with (
        open_ssh(server.address()) as device,
        pytest.raises(StoreError, match=r"has 0\.0 MB free .* 1\.\d MB are to be"),
    ):
        verify_on(device, bundle)
    assert not server.trees()


def _with_free_bytes(monkeypatch, free_bytes: int) -> None:
    asked = SshDevice._have
    monkeypatch.setattr(SshDevice, "_have", lambda self, trees: {**asked(self, trees), "free_bytes": free_bytes})


# --- the connection -----------------------------------------------------------------------------------------


def test_a_broken_push_goes_on_where_it_broke(server: Server, bundle: Path, monkeypatch):
    """Cut when a part has come: the next push sends the rest, and no more."""
    whole, offsets = ssh._content, []

    def broken(tree, offset):
        for i, chunk in enumerate(whole(tree, offset)):
            if i == 20:
                _wait_for(lambda: _n_bytes(server.cache) > 0)
                server.drop_connections()
                _wait_for(lambda: server.connections() == 0)
            yield chunk

    def noted(tree, offset):
        offsets.append(offset)
        return whole(tree, offset)

    monkeypatch.setattr(ssh, "_content", broken)
    with open_ssh(server.address()) as device, pytest.raises(MissingToolError, match="is lost"):
        verify_on(device, bundle)
    assert not server.trees()
    came = _n_bytes(server.cache)
    monkeypatch.setattr(ssh, "_content", noted)
    with open_ssh(server.address()) as device:
        assert verify_on(device, bundle)
    assert offsets == [came, 0]
    assert not server.leftovers()


def test_what_was_damaged_there_is_pushed_anew(server: Server, bundle: Path):
    with open_ssh(server.address()) as device:
        assert verify_on(device, bundle)
        graph = next(server.cache.rglob("model.onnx"))
        graph.write_bytes(graph.read_bytes()[:-1])
        assert verify_on(device, bundle)


def test_a_file_that_shrinks_while_it_is_pushed(server: Server, bundle: Path, monkeypatch):
    whole = ssh._content
    monkeypatch.setattr(ssh, "_content", lambda tree, offset: list(whole(tree, offset))[:-1])
    with open_ssh(server.address()) as device, pytest.raises(EdgeVLMError):
        verify_on(device, bundle)
    assert not server.trees()


def test_what_was_spoilt_on_the_way_is_refused(server: Server, bundle: Path, monkeypatch):
    whole = ssh._content
    monkeypatch.setattr(ssh, "_content", lambda tree, offset: (chunk.swapcase() for chunk in whole(tree, offset)))
    with open_ssh(server.address()) as device, pytest.raises(DataError, match="did not reach"):
        verify_on(device, bundle)
    assert not server.trees()
    assert not server.leftovers()


def test_two_pushes_of_the_same_at_once(server: Server, bundle: Path, monkeypatch):
    whole, seen = ssh._content, []

    def meanwhile(tree, offset):
        for chunk in whole(tree, offset):
            yield chunk
            if not seen:
                seen.append(tree)
                _wait_for(lambda: _n_bytes(server.cache) > 0)
                with open_ssh(server.address()) as other, pytest.raises(StoreError, match="Another push of the same"):
                    other._push_one(tree, other._have([tree])["offsets"][0])

    monkeypatch.setattr(ssh, "_content", meanwhile)
    with open_ssh(server.address()) as device:
        assert verify_on(device, bundle)
    assert seen


def _n_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_unreachable_device(server: Server):
    address = server.address(port=1)
    error = refused(address, "cannot be reached: .*Connection refused")
    config = shlex.quote(str(server.folder / "ssh_config"))
    assert error.hint.endswith(f"ssh -F {config} -p 1 {server.name.replace(f':{server.port}', '')}")


def test_a_name_that_nobody_knows(server: Server):
    refused("ssh://no-such-host.invalid", "cannot be reached: Could not resolve")


def test_a_key_that_the_device_does_not_know(server: Server):
    config = server.config("stranger", IdentityFile=str(server.folder / "stranger_key"))
    error = refused(server.address(config=config), "does not let us in without a password")
    assert "ssh-copy-id" in error.hint


def test_a_host_key_that_is_not_known(server: Server):
    config = server.config("unknown", UserKnownHostsFile="none", StrictHostKeyChecking="no")
    error = refused(server.address(config=config), "The host key of .* is not known here")
    assert "fingerprint" in error.hint


@pytest.mark.parametrize("alias", ["", "board"])
def test_a_host_key_that_has_changed(server: Server, alias: str):
    known, name = server.folder / "changed", alias or f"[127.0.0.1]:{server.port}"
    known.write_text(f"{name} {(server.folder / 'stranger_key.pub').read_text()}")
    changes = {"HostKeyAlias": alias} if alias else {}
    config = server.config("moved", UserKnownHostsFile=str(known), **changes)
    error = refused(server.address(config=config), "shows another host key")
    assert f"run: {shlex.join(['ssh-keygen', '-R', name, '-f', str(known)])}; then ssh -F " in error.hint


_SLEEPS = ("Path(os.environ['EDGEVLM_CACHE'], 'pid').write_text(str(os.getpid()))", "time.sleep(300)")


def test_a_connection_lost_on_the_way_is_an_error_here_and_the_end_there(server: Server, bundle: Path, monkeypatch):
    _stand_in(monkeypatch, server, *_SLEEPS)
    with open_ssh(server.address()) as device:
        threading.Thread(target=lambda: (_pid_of_the_verb(server), server.drop_connections())).start()
        with pytest.raises(MissingToolError, match=f"The connection to {server.name} is lost") as caught:
            device.run("verify", bundle)
    assert caught.value.hint
    assert _ends(_pid_of_the_verb(server))


def test_ctrl_c_ends_the_verb_there(server: Server, bundle: Path, monkeypatch):
    _stand_in(monkeypatch, server, *_SLEEPS)
    this = os.getpid()
    with open_ssh(server.address()) as device:
        threading.Thread(target=lambda: (_pid_of_the_verb(server), os.kill(this, signal.SIGINT))).start()
        with pytest.raises(KeyboardInterrupt):
            device.run("verify", bundle)
        assert _ends(_pid_of_the_verb(server))
    assert not server.leftovers()


def test_a_verb_whose_user_gives_no_sign_of_life_is_ended_there(server: Server, bundle: Path, monkeypatch):
    """A network that is gone may leave a connection that both sides take for a quiet one."""
    _stand_in(monkeypatch, server, *_SLEEPS)
    monkeypatch.setattr(ssh, "_SIGN_OF_LIFE_S", 1e6)
    with open_ssh(server.address()) as device:
        assert "\nSILENCE_S = 90.0\n" in device._connection._source
        device._connection._source = device._connection._source.replace("SILENCE_S = 90.0", "SILENCE_S = 3.0")
        with pytest.raises(EdgeVLMError, match="the process ended with"):
            device.run("verify", bundle)
    assert _ends(_pid_of_the_verb(server))


def test_a_long_verb_is_left_alone_as_long_as_there_are_signs_of_life(server: Server, bundle: Path, monkeypatch):
    _stand_in(monkeypatch, server, "time.sleep(5); print('{}')")
    monkeypatch.setattr(ssh, "_SIGN_OF_LIFE_S", 0.5)
    with open_ssh(server.address()) as device:
        device._connection._source = device._connection._source.replace("SILENCE_S = 90.0", "SILENCE_S = 3.0")
        assert device.run("verify", bundle) == b"{}\n"


def _pid_of_the_verb(server: Server) -> int:
    file = server.cache / "pid"
    _wait_for(lambda: file.exists() and file.read_text())
    return int(file.read_text())


def _ends(pid: int) -> bool:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_the_connection_ends_with_the_block(server: Server):
    with open_ssh(server.address()):
        assert server.connections() == 1, "one for all"
    _wait_for(lambda: server.connections() == 0)


def test_what_a_login_script_prints_is_no_answer(server: Server, bundle: Path):
    python = python_that(server.folder / "python", "echo 'Welcome to your device!'; echo 'It is warm.' >&2")
    with open_ssh(server.address(python=python)) as device:
        assert verify_on(device, bundle)


def test_without_ssh_here(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    refused("ssh://pi", "ssh, which is not installed")
