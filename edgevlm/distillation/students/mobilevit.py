"""MobileViT XXS, XS and S: convolutions with a few transformer blocks over unfolded patches.

Paper: MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision Transformer, arXiv:2110.02178 (1.3, 2.3
and 5.6 million parameters).
Code: Transformers' ``MobileViTModel`` (Apache-2.0), in the configurations of apple/mobilevit-xx-small, -x-small and
-small; no weights are taken from there. The paper's dropout inside the transformer blocks is left out: it would add
noise to the very features that are compared with a teacher's.
"""

from __future__ import annotations

from edgevlm.distillation.students.tower import LARGE_TEXT, SMALL_TEXT, TowerStudent

XXS = TowerStudent(
    name="mobilevit-xxs",
    transformers_name="MobileViT",
    config={
        "hidden_sizes": [64, 80, 96],
        "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320],
        "expand_ratio": 2.0,
        "hidden_dropout_prob": 0.0,
    },
    width=320,
    text=SMALL_TEXT,
)
XS = TowerStudent(
    name="mobilevit-xs",
    transformers_name="MobileViT",
    config={
        "hidden_sizes": [96, 120, 144],
        "neck_hidden_sizes": [16, 32, 48, 64, 80, 96, 384],
        "hidden_dropout_prob": 0.0,
    },
    width=384,
    text=SMALL_TEXT,
)
S = TowerStudent(
    name="mobilevit-s",
    transformers_name="MobileViT",
    config={
        "hidden_sizes": [144, 192, 240],
        "neck_hidden_sizes": [16, 32, 64, 96, 128, 160, 640],
        "hidden_dropout_prob": 0.0,
    },
    width=640,
    text=LARGE_TEXT,
)
