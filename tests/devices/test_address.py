"""What an address may be, and what the install on a device must have."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import tomllib

from edgevlm.devices import open_device
from edgevlm.devices.ssh import (
    BASE_LIBRARIES,
    LEAST_PYTHON,
    LIBRARIES_OF_3_10,
    Address,
    _connection_error,
    parse_address,
)
from edgevlm.devices.trees import runtime_tree
from edgevlm.errors import UsageError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ssh://pi", Address(host="pi")),
        ("ssh://pi@raspberrypi.local/", Address(host="raspberrypi.local", user="pi")),
        ("ssh://Jetson-Alias", Address(host="Jetson-Alias")),
        ("ssh://me@10.0.0.2:2222", Address(host="10.0.0.2", user="me", port=2222)),
        ("ssh://me@[fe80::1]:2222", Address(host="fe80::1", user="me", port=2222)),
        ("ssh://pi?python=/opt/my%20python/bin/python3", Address(host="pi", python="/opt/my python/bin/python3")),
        ("ssh://pi?config=./ssh_config", Address(host="pi", config="./ssh_config")),
    ],
)
def test_an_address_names_host_user_port_and_python(text: str, address: Address):
    assert parse_address(text) == address


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ssh://", "no address"),
        ("ssh://-oProxyCommand=touch%20x", "no address"),
        ("ssh://-oProxyCommand=x@host", "no address"),
        ("ssh://user@host;touch x", "no address"),
        ("ssh://$(touch x)@host", "no address"),
        ("ssh://host/some/where", "no address"),
        ("ssh://host#there", "no address"),
        ("ssh://host:none", "no address"),
        ("ssh://host:99999", "no address"),
        ("ssh://user:secret@host", "holds no password"),
        ("ssh://host?pyhton=/usr/bin/python3", "Did you mean 'python'?"),
        ("ssh://host?python=", "without a plain value"),
        ("ssh://host?python=a%0Ab", "without a plain value"),
    ],
)
def test_what_is_no_address_is_refused_before_ssh_sees_it(text: str, words: str):
    with pytest.raises(UsageError) as caught:
        parse_address(text)
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "command"),
    [
        (("Offending ED25519 key in /home/me/my hosts:3", "Host key for board has changed and you have requested"),
         "ssh-keygen -R board -f '/home/me/my hosts'"),
        (("Offending key in /etc/hosts:12", "ED25519 host key for [10.0.0.2]:22 has changed and you have requested"),
         "ssh-keygen -R '[10.0.0.2]:22' -f /etc/hosts"),
        ((), "ssh-keygen -R '[pi]:2222'"),
    ],
)  # fmt: skip
def test_a_changed_host_key_is_removed_where_ssh_says_that_it_is(lines: tuple[str, ...], command: str):
    said = "\n".join(("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @", *lines))
    address = Address(host="pi", port=2222, config="~/my config")
    hint = _connection_error(address, said, was_there=False).hint
    login = f"ssh -F {shlex.quote(str(Path.home() / 'my config'))} -p 2222 pi"
    assert hint == f"If it was set up anew, run: {command}; then {login}, once."


def test_an_unknown_kind_of_device_is_named():
    with pytest.raises(UsageError, match="'shh://pi' is no device"), open_device("shh://pi"):
        pass


def test_what_a_device_needs_is_what_the_base_install_has():
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert pyproject["requires-python"] == f">={LEAST_PYTHON}"
    needed = {f"{name}>={least}" for name, least in BASE_LIBRARIES.values()}
    needed |= {f"{name}>={least}; python_version < '3.11'" for name, least in LIBRARIES_OF_3_10.values()}
    assert {*pyproject["dependencies"]} == needed


def test_the_runtime_that_is_pushed_is_the_same_each_time_and_has_the_data_folders():
    tree = runtime_tree()
    paths = [file.path for file in tree.files]
    assert tree.id == runtime_tree().id
    assert {"edgevlm/__main__.py", "edgevlm/_data/targets/cpu.toml", "edgevlm/_data/calibration/quick.toml"} < {*paths}
    assert not [path for path in paths if "demo_model" in path or "__pycache__" in path]
