"""Prompts in the loop, with decoders made by hand, and with SAM's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit

from edgevlm.distillation.objectives.prompts import with_point
from edgevlm.errors import UsageError
from tests.distillation.steps import SAM, make_step, objectives_of, outputs, random, value_of

P, C, H, W = 2, 3, 4, 6
N = 2


class Decoder:
    """Masks that depend on who is asked, the embeddings and how many points there are."""

    def __init__(self):
        self.asked = []

    def __call__(self, who, embeds, prompts):
        self.asked.append((who, dict(prompts)))
        n_points = prompts["input_points"].shape[2] if "input_points" in prompts else 0
        base = random(N, P, C, H, W, seed={"student": 1, "teacher": 2}[who] + 10 * n_points)
        scores = random(N, P, C, seed=33 + n_points)
        return {"pred_masks": base * (1 + embeds.mean((1, 2, 3)))[:, None, None, None, None], "iou_scores": scores}


def points(n_points=1):
    return {
        "input_points": 12 * torch.rand(N, P, n_points, 2, generator=torch.Generator().manual_seed(0)),
        "input_labels": torch.ones(N, P, n_points, dtype=torch.int64),
    }


def step_of(decoder, prompts, **more):
    return make_step(
        outputs(SAM, n=N), outputs(SAM, n=N, seed=100), n=N, decode=decoder, prompts=prompts,
        pixel_values=random(N, 3, 8, 18), **more,
    )  # fmt: skip


def test_masks_are_compared_by_cross_entropy_and_dice_in_each_round():
    decoder = Decoder()
    found = value_of("prompts", step_of(decoder, points()), student=SAM)
    total = 0.0
    assert [who for who, _ in decoder.asked] == ["student", "teacher"] * 2
    rounds = decoder.asked[::2]
    step = step_of(None, None)
    for _, asked in rounds:
        student, teacher = (
            Decoder()(who, side["image_embeds"].detach(), asked)["pred_masks"].numpy().astype(float)
            for who, side in (("student", step.student), ("teacher", step.teacher))
        )
        p, t = expit(student), teacher > 0
        bce = -np.where(t, np.log(p), np.log(1 - p)).mean()
        dice = [
            1 - (2 * p[at][t[at]].sum() + 1) / (p[at].sum() + t[at].sum() + 1) for at in np.ndindex(student.shape[:3])
        ]
        total += bce + np.mean(dice)
    assert found.item() == pytest.approx(total / 2, rel=1e-5)


def test_a_point_is_added_where_the_best_masks_differ():
    decoder = Decoder()
    first = points()
    step = step_of(decoder, first)
    value_of("prompts", step, student=SAM)
    (_, before), (_, teachers), (_, after), (_, again) = decoder.asked
    assert before["input_points"] is teachers["input_points"]
    assert torch.equal(after["input_points"], again["input_points"])
    assert torch.equal(after["input_points"][:, :, :1], first["input_points"])
    assert after["input_labels"].dtype == torch.int64
    check_points(step, after, Decoder()("student", step.student["image_embeds"].detach(), first)["pred_masks"],
                 Decoder()("teacher", step.teacher["image_embeds"], first))  # fmt: skip


def check_points(step, asked, mine, teacher):
    seen = set()
    for n, p in np.ndindex(N, P):
        best = teacher["iou_scores"][n, p].argmax()
        x, y = asked["input_points"][n, p, -1]
        # Pictures are 18 pixels by 8, masks 6 by 4: a point is the middle of a pixel of the mask.
        column, row = (x + 0.5) / 3 - 0.5, (y + 0.5) / 2 - 0.5
        assert column == column.round()
        assert row == row.round()
        at = (n, p, best, int(row), int(column))
        is_object = teacher["pred_masks"][at] > 0
        assert (mine[at] > 0) != is_object
        assert asked["input_labels"][n, p, -1] == int(is_object)
        seen.add((int(row), int(column)))
    return seen


def test_what_a_picture_was_filled_up_with_counts_for_nothing():
    """The lower half and the last third are padding: the value is that of the rest alone, and no point lies there."""
    shown = torch.zeros(N, 8, 18, dtype=torch.bool)
    shown[:, :4, :12] = True
    whole = value_of("prompts", step_of(Decoder(), points(), shown=torch.ones_like(shown)), student=SAM)
    assert whole == value_of("prompts", step_of(Decoder(), points()), student=SAM)

    class Cut(Decoder):
        """Says at the border what it will."""

        def __init__(self, value):
            super().__init__()
            self.value = value

        def __call__(self, who, embeds, prompts):
            made = super().__call__(who, embeds, prompts)
            masks = made["pred_masks"].clone()
            sign = 1 if who == "student" else -1
            masks[..., 2:, :], masks[..., 4:] = sign * self.value, sign * self.value
            return {**made, "pred_masks": masks}

    decoders = [Cut(1.0), Cut(9.0)]
    first, second = (value_of("prompts", step_of(d, points(), shown=shown), student=SAM) for d in decoders)
    assert first == second
    asked = decoders[0].asked[-1][1]
    drawn = asked["input_points"][:, :, -1][asked["input_labels"][:, :, -1] >= 0]
    assert len(drawn) and (drawn[:, 0] < 12).all() and (drawn[:, 1] < 4).all()


def test_a_student_of_smaller_pictures_is_compared_at_its_own_size():
    class Finer(Decoder):
        def __call__(self, who, embeds, prompts):
            made = super().__call__(who, embeds, prompts)
            if who == "teacher":
                made["pred_masks"] = made["pred_masks"].repeat_interleave(2, -1).repeat_interleave(2, -2)
            return made

    assert value_of("prompts", step_of(Finer(), points()), student=SAM).isfinite()


def test_every_place_that_differs_is_drawn():
    student, teacher = torch.zeros(N, P, 1, H, W) - 1, torch.zeros(N, P, 1, H, W) - 1
    teacher[..., 0, 1] = teacher[..., 3, 5] = student[..., 2, 2] = 1
    found = {}
    for seed in range(40):
        step = step_of(None, None, seed=seed)
        asked = with_point(step, {}, {"pred_masks": student}, {"pred_masks": teacher})
        for (x, y), label in zip(asked["input_points"].reshape(-1, 2), asked["input_labels"].ravel(), strict=True):
            place = (int((y + 0.5) // 2), int((x + 0.5) // 3))
            found[place] = found.get(place, 0) + 1
            assert label == (0 if place == (2, 2) else 1)
    assert set(found) == {(0, 1), (3, 5), (2, 2)}
    # 160 draws among three: a third each, to four standard errors.
    assert min(found.values()) > 160 / 3 - 4 * (160 * 2 / 9) ** 0.5


def test_where_nothing_differs_the_point_is_none():
    masks = {"pred_masks": random(N, P, C, H, W)}
    asked = with_point(step_of(None, None), {"input_boxes": torch.zeros(N, P, 4)}, masks, masks)
    assert asked["input_points"].shape == (N, P, 1, 2)
    assert (asked["input_points"] == 0).all()
    assert (asked["input_labels"] == -1).all()
    assert "input_boxes" in asked


def test_only_the_student_learns():
    step = step_of(Decoder(), points())
    teacher = step.teacher["image_embeds"].requires_grad_()
    value_of("prompts", step, student=SAM).backward()
    assert step.student["image_embeds"].grad.abs().sum() > 0
    assert teacher.grad is None


def test_without_a_decoder_there_are_no_masks():
    with pytest.raises(UsageError, match="needs a mask decoder"):
        value_of("prompts", step_of(None, points()), student=SAM)


def test_without_prompts_nothing_is_asked():
    with pytest.raises(UsageError, match="'prompts' needs prompts, and the data set has none"):
        value_of("prompts", step_of(Decoder(), None), student=SAM)


@pytest.mark.parametrize("kind", ["points", "boxes"])
def test_sams_own_decoder_takes_the_prompts(kind):
    transformers = pytest.importorskip("transformers", reason="Transformers, which has SAM, is not installed")
    torch.manual_seed(0)
    size = {"image_size": 64, "patch_size": 16}
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 32, "output_channels": 16,
            "window_size": 2, "global_attn_indexes": [0], "num_pos_feats": 8, **size,
        },
        prompt_encoder_config={"hidden_size": 16, "image_embedding_size": 4, "mask_input_channels": 4, **size},
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )  # fmt: skip
    models = {who: transformers.SamModel(config).eval() for who in ("student", "teacher")}
    pictures = random(N, 3, 64, 64)
    asked = []

    def decode(who, embeds, prompts):
        asked.append(dict(prompts))
        made = models[who](image_embeddings=embeds, **prompts)
        return {"pred_masks": made.pred_masks, "iou_scores": made.iou_scores}

    corners = torch.tensor([8.0, 8.0, 40.0, 40.0]).expand(N, P, 4)
    prompts = {key: value * 4 if key == "input_points" else value for key, value in points().items()}
    embeds = {who: model.vision_encoder(pictures).last_hidden_state for who, model in models.items()}
    step = make_step(
        {"image_embeds": embeds["student"]}, {"image_embeds": embeds["teacher"].detach()}, n=N, pixel_values=pictures,
        decode=decode, prompts=prompts if kind == "points" else {"input_boxes": corners},
    )  # fmt: skip
    (value,) = objectives_of("prompts", student={"image_embeds": (16, 4, 4)}, n_rounds=3)(step).values()
    value.backward()
    assert value.item() > 0
    assert models["student"].vision_encoder.patch_embed.projection.weight.grad.abs().sum() > 0
    assert models["student"].mask_decoder.iou_token.weight.grad is not None
    assert all(parameter.grad is None for parameter in models["teacher"].mask_decoder.parameters())
    n_points = [each["input_points"].shape[2] if "input_points" in each else 0 for each in asked[::2]]
    assert n_points == ([1, 2, 3] if kind == "points" else [0, 1, 2])
