"""The table of students in docs/students.md: parameters and multiply-accumulates, counted on modules without weights.

    python -m benchmarks.students

Replaces what stands there between the two marks. Nothing is timed: `edgevlm distill` times a student beside its teacher
on the machine that it runs on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgevlm.distillation.students import STUDENTS, load_student
from edgevlm.distillation.students.facts import count
from edgevlm.distillation.students.tower import TeachersSpace, TowerStudent, text_config
from edgevlm.families import CLASSIFY
from edgevlm.model import Graph, Model, Source
from edgevlm.runtime.spec import ImageProcessing, Processing, Rescale, Resize, TensorSpec

PAGE = Path(__file__).resolve().parents[1] / "docs" / "students.md"
BEGIN, END = "<!-- students: begin -->", "<!-- students: end -->"
SIZES = (64, 224, 256)
N_CLASSES = 1000
# The text side of openai/clip-vit-base-patch32.
CLIP_B_32 = TeachersSpace(
    projection_dim=512,
    vocab_size=49408,
    length=77,
    width=512,
    mlp_width=2048,
    n_layers=12,
    n_heads=8,
    hidden_act="quick_gelu",
    start_token_id=49406,
    end_token_id=49407,
    pad_token_id=49407,
)


def table() -> str:
    """Markdown, a row for each student that is made of an image tower."""
    sizes = "".join(f" MMACs at {size}² |" for size in SIZES)
    lines = [
        f"| student | classifier, parameters |{sizes} features | text tower, layers × width | parameters | of words |",
        "|---|---:|" + "---:|" * (len(SIZES) + 1) + "---:|---:|---:|",
    ]
    for name in STUDENTS:
        student = load_student(name)
        if not isinstance(student, TowerStudent):
            continue
        found = [count_classifier(student, size) for size in SIZES]
        macs = "".join(f" {n_macs / 1e6:,.0f} |" for _, n_macs in found)
        text = text_parameters(student)
        tower = f"{student.text.n_layers} × {student.text.width}"
        millions = " | ".join(f"{text[part] / 1e6:.2f} M" for part in ("layers", "words"))
        lines.append(f"| `{name}` | {found[0][0] / 1e6:.2f} M |{macs} {student.width} | {tower} | {millions} |")
    return "\n".join(lines)


def count_classifier(student: TowerStudent, size: int) -> tuple[int, int]:
    """Parameters and multiply-accumulates of a classifier of 1000 classes."""
    teacher = _teacher(size)
    facts = count(student.build(teacher, n_classes=N_CLASSES), teacher)
    return facts.n_parameters, facts.n_macs


def text_parameters(student: TowerStudent) -> dict[str, int]:
    """Of the text tower beside it where CLIP ViT-B/32 teaches; the table of words apart, which costs no time."""
    import torch
    import transformers

    with torch.device("meta"):
        module: Any = transformers.CLIPTextModel._from_config(text_config(student.text, CLIP_B_32))
    n_words = module.embeddings.token_embedding.weight.numel()
    return {"layers": sum(p.numel() for p in module.parameters()) - n_words, "words": n_words}


def _teacher(size: int) -> Model:
    """A classifier of pictures of this size, as far as a count asks for one."""
    image = ImageProcessing(height=size, width=size, steps=(Resize(height=size, width=size), Rescale(factor=1 / 255)))
    inputs = (TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, size, size)),)
    return Model(
        name="any",
        task=CLASSIFY,
        family="image_classifier",
        graphs=(Graph(name="model", inputs=inputs, outputs=("logits",)),),
        processing=Processing(image=image),
        source=Source(kind="hugging_face", location="", asked="any", digest="", weights_sha256=""),
    )


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
