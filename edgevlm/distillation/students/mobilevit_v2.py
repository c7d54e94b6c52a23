"""MobileViTv2 at widths 0.5, 0.75 and 1.0: MobileViT with an attention whose cost is linear in the patches.

Paper: Separable Self-attention for Mobile Vision Transformers, arXiv:2206.02680 (1.4, 2.9 and 4.9 million parameters).
Code: Transformers' ``MobileViTV2Model`` (Apache-2.0), in the configurations of apple/mobilevitv2-0.5, -0.75 and -1.0;
no weights are taken from there.
"""

from __future__ import annotations

from edgevlm.distillation.students.tower import LARGE_TEXT, SMALL_TEXT, TowerStudent

HALF = TowerStudent(
    name="mobilevitv2-0.5",
    transformers_name="MobileViTV2",
    config={"width_multiplier": 0.5},
    width=256,
    text=SMALL_TEXT,
)
THREE_QUARTERS = TowerStudent(
    name="mobilevitv2-0.75",
    transformers_name="MobileViTV2",
    config={"width_multiplier": 0.75},
    width=384,
    text=SMALL_TEXT,
)
WHOLE = TowerStudent(
    name="mobilevitv2-1.0",
    transformers_name="MobileViTV2",
    config={"width_multiplier": 1.0},
    width=512,
    text=LARGE_TEXT,
)
