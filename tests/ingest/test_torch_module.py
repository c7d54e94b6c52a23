from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.errors import EdgeVLMError, ModelError, UsageError
from edgevlm.export import open_source
from edgevlm.ingest import read_model
from tests.ingest.layouts import write_card

SOURCE = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.classify = torch.nn.Linear(3, 2)

    def forward(self, pixel_values):
        return self.classify(pixel_values.mean((2, 3)))


class Named(Net):
    def forward(self, pixel_values):
        return {"scores": super().forward(pixel_values)}


def make():
    return Net()


def named():
    return Named()


def broken():
    raise RuntimeError("out of order\\nsecond line")


def number():
    return 3


def diverged():
    net = Net()
    net.classify.weight.data[0, 0] = float("nan")
    return net


def nothing():
    net = Net()
    net.forward = lambda pixel_values: None
    return net
"""
CARD = 'task = "image-classification"\nlabels = ["a", "b"]\n[input]\nheight = 8\nwidth = 8\n'


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "ourpackage"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "nets.py").write_text(SOURCE, encoding="utf-8")
    write_card(folder / "nets.card.toml", CARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.startswith("ourpackage")]:
        del sys.modules[name]


def refused(kind: type[EdgeVLMError], asked: str, **kwargs: Any) -> EdgeVLMError:
    with pytest.raises(EdgeVLMError) as caught:
        read_model(asked, **kwargs)
    assert type(caught.value) is kind
    assert caught.value.hint
    return caught.value


def test_a_factory_and_its_card(package: Path):
    model = read_model("ourpackage.nets:make")
    assert (model.name, model.family, model.labels) == ("make", "torch_module", ("a", "b"))
    pictures = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    assert open_source(model, "model").run({"pixel_values": pictures})["logits"].shape == (2, 2)


def test_random_weights_are_the_same_each_time(package: Path):
    assert read_model("ourpackage.nets:make") == read_model("ourpackage.nets:make")


def test_the_digest_follows_the_source(package: Path):
    before = read_model("ourpackage.nets:make").source.digest
    (package / "nets.py").write_text(SOURCE + "\n# changed\n", encoding="utf-8")
    assert read_model("ourpackage.nets:make").source.digest != before


def test_two_factories_of_one_file_are_two_models(package: Path):
    """Both have the same weights and the same source, and compute different things."""
    source = SOURCE + "\nclass Twice(Net):\n    def forward(self, pixel_values):\n"
    source += "        return 2 * super().forward(pixel_values)\n\n\ndef twice():\n    return Twice()\n"
    (package / "nets.py").write_text(source, encoding="utf-8")
    one, two = (read_model(f"ourpackage.nets:{name}").source for name in ("make", "twice"))
    assert one.weights_sha256 == two.weights_sha256
    assert one.digest != two.digest


def test_the_digest_follows_what_the_source_imports_from_beside_it(package: Path):
    """A flat project, as people have them: a script that imports another script."""
    beside = package.parent / "ourpackage_layers.py"
    beside.write_text("def pool(x):\n    return x.mean((2, 3))\n", encoding="utf-8")
    changed = SOURCE.replace("pixel_values.mean((2, 3))", "pool(pixel_values)")
    (package / "nets.py").write_text(f"from ourpackage_layers import pool\n{changed}", encoding="utf-8")
    before = read_model("ourpackage.nets:make").source.digest
    assert read_model("ourpackage.nets:make").source.digest == before
    beside.write_text("def pool(x):\n    return x.amax((2, 3))\n", encoding="utf-8")
    assert read_model("ourpackage.nets:make").source.digest != before


def test_outputs_by_name(package: Path):
    pictures = {"pixel_values": np.ones((1, 3, 8, 8), np.float32)}
    with pytest.raises(ModelError, match="gives 'scores', and not 'logits'"):
        open_source(read_model("ourpackage.nets:named"), "model").run(pictures)
    card = write_card(package / "named.toml", f'{CARD}[outputs]\nlogits = "scores"\n')
    model = read_model("ourpackage.nets:named", card=card)
    assert open_source(model, "model").run(pictures)["logits"].shape == (1, 2)


def test_what_a_factory_may_do_wrong(package: Path):
    assert "RuntimeError: out of order" in refused(ModelError, "ourpackage.nets:broken").message
    assert "returned a int" in refused(ModelError, "ourpackage.nets:number").message
    diverged = refused(ModelError, "ourpackage.nets:diverged")
    assert "'classify.weight'" in diverged.message
    assert "1 values that are NaN" in diverged.message
    with pytest.raises(ModelError, match="returned a NoneType"):
        open_source(read_model("ourpackage.nets:nothing"), "model").outputs  # noqa: B018


def test_what_a_user_may_write_wrong(package: Path):
    assert "'make'" in refused(UsageError, "ourpackage.nets:mak").hint
    assert "cannot be imported" in refused(UsageError, "ourpackage.missing:make").message
    assert (
        "not image-feature-extraction"
        in refused(UsageError, "ourpackage.nets:make", task="image-feature-extraction").message
    )
    (package / "nets.card.toml").unlink()
    assert "has no card" in refused(ModelError, "ourpackage.nets:make").message
    (package / "bad.py").write_text("1 / 0\n", encoding="utf-8")
    assert "ZeroDivisionError" in refused(ModelError, "ourpackage.bad:make").message
