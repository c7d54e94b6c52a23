"""The model that this project trained on its own generated pictures and carries along."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from edgevlm.ingest.asked import Asked
from edgevlm.ingest.hugging_face import read_folder
from edgevlm.model import Model


def read_demo(asked: Asked) -> Model:
    from edgevlm.data.shapes import PROMPT_TEMPLATE

    folder = Path(str(files("edgevlm.data"))) / "demo_model"
    return read_folder(asked, folder, revision=None, prompt_template=PROMPT_TEMPLATE.format(label="{}"))
