"""The thing that a point or a box shows, cut out as Transformers cuts it out."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from PIL import Image

from edgevlm.errors import BundleError, DataError, UsageError
from edgevlm.runtime.image import check_image_processing, preprocess
from edgevlm.runtime.pipeline import Pipeline
from edgevlm.runtime.prompts import prompts_of
from edgevlm.runtime.spec import Array, ImageProcessing, Normalize, Pad, Processing, Prompt, Rescale, Resize, TensorSpec
from edgevlm.runtime.tasks.mask_generation import Mask, Masks, decoder_prompts, full_size, mask_iou, resize_bilinear

SIDE = 64
IMAGE = ImageProcessing(
    height=SIDE,
    width=SIDE,
    steps=(
        Resize(longest_edge=SIDE),
        Rescale(factor=1 / 255),
        Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        Pad(height=SIDE, width=SIDE),
    ),
)
SIZES = [(64, 64), (40, 100), (131, 57), (300, 301), (7, 200)]


class Encoder:
    """A quarter of the picture's brightness; counts how often it looks."""

    inputs = (TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, SIDE, SIDE)),)
    outputs = (TensorSpec(name="image_embeds", dtype="float32", shape=("batch", 1, 16, 16)),)

    def __init__(self) -> None:
        self.n_calls = 0

    def run(self, feeds):
        self.n_calls += 1
        pixels = feeds["pixel_values"].mean(axis=1, keepdims=True)
        return {"image_embeds": pixels.reshape(len(pixels), 1, 16, 4, 16, 4).mean(axis=(3, 5))}


class Decoder:
    """The single mask is what is bright; the suggestions are a disc around the first place, growing."""

    inputs = (
        TensorSpec(name="image_embeds", dtype="float32", shape=("batch", 1, 16, 16)),
        TensorSpec(name="input_points", dtype="float32", shape=("batch", "prompts", "points", 2)),
        TensorSpec(name="input_labels", dtype="int64", shape=("batch", "prompts", "points")),
    )
    outputs = ()

    def __init__(self, scores=(0.5, 0.6, 0.9, 0.7)) -> None:
        self.scores = scores
        self.asked: list[tuple[Array, Array]] = []

    def run(self, feeds):
        points, labels = feeds["input_points"], feeds["input_labels"]
        self.asked.append((points, labels))
        at = (np.arange(16) + 0.5) * 4
        far = np.hypot(at[None, :] - points[0, :, 0, 0, None, None], at[:, None] - points[0, :, 0, 1, None, None])
        bright = np.broadcast_to(feeds["image_embeds"][0], far.shape)
        masks = np.stack([bright, *(radius - far for radius in (8, 12, 16))], axis=1)[None].astype(np.float32)
        return {"pred_masks": masks, "iou_scores": np.tile(np.float32(self.scores), (1, len(far), 1))}


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


@pytest.fixture
def decoder() -> Decoder:
    return Decoder()


@pytest.fixture
def pipeline(encoder: Encoder, decoder: Decoder) -> Pipeline:
    sessions = {"image_encoder": encoder, "mask_decoder": decoder}
    return Pipeline.from_parts(task="mask-generation", processing=Processing(image=IMAGE), sessions=sessions)


def picture(height: int, width: int) -> Image.Image:
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, width // 2 :] = 255
    return Image.fromarray(pixels)


# --- preprocessing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_pixels_are_transformers(size: tuple[int, int]):
    import transformers

    rng = np.random.default_rng(3)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    theirs = transformers.SamImageProcessorPil(
        size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    expected = theirs(image, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(preprocess(image, IMAGE), expected.astype(np.float32))


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((Pad(height=SIDE, width=SIDE), Resize(longest_edge=SIDE)), "not the last"),
        ((Resize(longest_edge=SIDE + 1), Pad(height=SIDE, width=SIDE)), "smaller than the picture"),
        ((Resize(longest_edge=SIDE, shortest_edge=SIDE), Pad(height=SIDE, width=SIDE)), "two edges"),
        ((Resize(longest_edge=0), Pad(height=SIDE, width=SIDE)), "no size above 0"),
        ((Resize(shortest_edge=8), Pad(height=SIDE, width=SIDE)), "smaller than the picture"),
        ((Resize(longest_edge=SIDE),), "the steps end at"),
    ],
)
def test_steps_that_cannot_end_at_the_size_are_refused(steps, words: str):
    with pytest.raises(BundleError, match=words):
        check_image_processing(ImageProcessing(height=SIDE, width=SIDE, steps=steps))


# --- prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_places_are_transformers(size: tuple[int, int]):
    import transformers

    theirs = transformers.SamProcessor(
        transformers.SamImageProcessorPil(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE})
    )
    height, width = size
    points, box = [[width * 0.3, height * 0.6], [1.0, 2.0]], [2.0, 1.0, width - 3.0, height - 2.0]
    image = picture(height, width)
    expected = theirs(image, input_points=[[points]], input_boxes=[[box]], return_tensors="pt")
    asked = Prompt(points=tuple(map(tuple, points)), labels=(1, 0), box=tuple(box))
    ours = decoder_prompts([[asked]], [size], IMAGE)
    assert np.allclose(ours["input_points"][0, 0, :2], expected["input_points"][0, 0], atol=1e-5)
    assert np.allclose(ours["input_points"][0, 0, 2:].ravel(), expected["input_boxes"][0, 0], atol=1e-5)
    assert ours["input_labels"].tolist() == [[[1, 0, 2, 3]]]


def test_points_without_a_box_end_with_no_point():
    fed = decoder_prompts([[Prompt(points=((10, 20),), labels=(1,))]], [(64, 128)], IMAGE)
    assert fed["input_points"].tolist() == [[[[5, 10], [0, 0]]]]
    assert fed["input_labels"].tolist() == [[[1, -1]]]


def test_points_show_one_thing_and_boxes_one_each():
    assert prompts_of([(1, 2), (3, 4, 0)]) == (Prompt(points=((1, 2), (3, 4)), labels=(1, 0)),)
    assert prompts_of((), [(1, 2, 3, 4), (5, 6, 7, 8)]) == (Prompt(box=(1, 2, 3, 4)), Prompt(box=(5, 6, 7, 8)))
    assert prompts_of([(1, 2)], [(1, 2, 3, 4)]) == (Prompt(points=((1, 2),), labels=(1,), box=(1, 2, 3, 4)),)
    with pytest.raises(UsageError, match="which box"):
        prompts_of([(1, 2)], [(1, 2, 3, 4), (5, 6, 7, 8)])


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"points": [(40, 10)]}, "outside the picture, which is 40 pixels wide and 30 high"),
        ({"points": [(1, -1)]}, "outside"),
        ({"points": [(1, float("nan"))]}, "no number"),
        ({"points": [(1, 2, 7)]}, "no point"),
        ({"boxes": [(5, 5, 5, 9)]}, "holds nothing"),
        ({"boxes": [(50, 5, 60, 9)]}, "holds nothing"),
        ({"boxes": [(1, 2, 3)]}, "no box"),
        ({}, "which thing"),
        ({"points": [(1, 2)], "labels": ["cat"]}, "no labels"),
        ({"points": [(1, 2)], "top_k": 2}, "ranks nothing"),
    ],
)
def test_a_question_that_shows_nothing_is_refused(pipeline: Pipeline, asked, words: str):
    with pytest.raises(UsageError, match=words):
        pipeline(picture(30, 40), **asked)


def test_a_task_without_places_refuses_points():
    class Mean:
        inputs = (TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, SIDE, SIDE)),)
        outputs = (TensorSpec(name="logits", dtype="float32", shape=("batch", 3)),)

        def run(self, feeds):
            return {"logits": feeds["pixel_values"].mean(axis=(2, 3))}

    classifier = Pipeline.from_parts(
        task="image-classification", processing=Processing(image=IMAGE), sessions={"model": Mean()}
    )
    with pytest.raises(UsageError, match="takes no points or boxes"):
        classifier(picture(30, 40), points=[(1, 2)])


# --- masks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_masks_come_back_to_the_picture_as_transformers_leads_them(size: tuple[int, int]):
    import torch
    import transformers

    rng = np.random.default_rng(11)
    low = rng.normal(size=(3, 16, 16)).astype(np.float32)
    theirs = transformers.SamImageProcessorPil(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE})
    inputs = theirs(picture(*size), return_tensors="pt")
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    (expected,) = theirs.post_process_masks(torch.from_numpy(low)[None, None], *sizes, binarize=False)
    ours = full_size(low, size, IMAGE)
    assert np.allclose(ours, expected[0].numpy(), atol=1e-4)
    assert ((ours > 0) != (expected[0].numpy() > 0)).sum() <= 2  # where both are all but 0


@pytest.mark.parametrize("size", [(64, 64), (5, 7), (16, 100), (1, 1)], ids=str)
def test_resizing_is_torchs(size: tuple[int, int]):
    import torch

    values = np.random.default_rng(1).normal(size=(2, 16, 16)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(values)[None], size, mode="bilinear")[0].numpy()
    assert np.allclose(resize_bilinear(values, size), theirs, atol=1e-5)


def test_one_point_takes_the_likeliest_suggestion(pipeline: Pipeline):
    answer = pipeline(picture(64, 64), points=[(20, 30)])
    assert isinstance(answer, Masks)
    (mask,) = answer.masks
    assert mask.score == pytest.approx(0.9)
    inside = answer.to_arrays()[0]
    y, x = np.mgrid[:64, :64] + 0.5
    disc = np.hypot(x - 20, y - 30) < 12
    assert mask_iou(inside[None], disc[None])[0] > 0.9
    assert mask.n_pixels == inside.sum()
    left, top, right, bottom = mask.box
    assert inside[top:bottom, left:right].sum() == mask.n_pixels
    assert inside[top].any() and inside[bottom - 1].any() and inside[:, left].any() and inside[:, right - 1].any()


def test_a_box_and_several_points_take_the_single_mask(pipeline: Pipeline):
    right_half = np.zeros((40, 80), dtype=bool)
    right_half[:, 40:] = True
    for asked in ({"boxes": [(1, 1, 70, 30)]}, {"points": [(60, 20), (5, 5, 0)]}):
        answer = pipeline(picture(40, 80), **asked)
        assert mask_iou(answer.to_arrays(), right_half[None])[0] > 0.95
        assert answer.masks[0].score == pytest.approx(0.5)


def test_who_asks_may_say_what_is_ambiguous(pipeline: Pipeline):
    seen = pipeline.encode(picture(64, 64))
    prompts = [
        Prompt(points=((20, 30),), labels=(1,), is_ambiguous=False),
        Prompt(box=(10, 10, 50, 50), is_ambiguous=True),
    ]
    (answer,) = pipeline.results(seen.outputs, prompts=[prompts], sizes=[seen.size])
    assert [mask.score for mask in answer.masks] == pytest.approx([0.5, 0.9])


def test_the_picture_is_seen_once_however_often_it_is_asked_about(pipeline: Pipeline, encoder: Encoder):
    seen = pipeline.encode(picture(64, 64))
    answers = [seen.answer(points=[(20 + i, 30)]) for i in range(3)]
    assert encoder.n_calls == 1
    assert answers[1] == pipeline(picture(64, 64), points=[(21, 30)])


def test_prompts_of_different_lengths_are_never_padded(pipeline: Pipeline, decoder: Decoder):
    prompts = [Prompt(points=((x, 9),), labels=(1,)) for x in range(20)]
    prompts.insert(3, Prompt(points=((1, 2), (3, 4)), labels=(1, 1)))
    seen = pipeline.encode(picture(64, 64))
    (answer,) = pipeline.results(seen.outputs, prompts=[prompts], sizes=[seen.size])
    assert [points.shape[1:3] for points, _ in decoder.asked] == [(16, 2), (4, 2), (1, 3)]
    assert len(answer.masks) == 21
    alone = [pipeline.results(seen.outputs, prompts=[[each]], sizes=[seen.size])[0].masks[0] for each in prompts]
    assert list(answer.masks) == alone


def test_an_empty_mask_has_no_box():
    empty = Masks(height=2, width=3, masks=(Mask(score=0.1, box=None, n_pixels=0, runs="6"),))
    assert not empty.to_arrays().any()
    assert "nothing" in empty.to_text()


@pytest.mark.parametrize("runs", ["", "1 2", "7", "a"])
def test_runs_that_make_no_mask_are_refused(runs: str):
    broken = Masks(height=2, width=3, masks=(Mask(score=0.1, box=None, n_pixels=0, runs=runs),))
    with pytest.raises(DataError, match="runs"):
        broken.to_arrays()


def test_answers_are_the_same_within_a_share_of_pixels():
    def answer(runs: str, score: float = 0.8) -> Masks:
        return Masks(height=10, width=10, masks=(Mask(score=score, box=None, n_pixels=0, runs=runs),))

    one = answer("20 30 50")
    assert one.is_same_answer(answer("20 30 50"), tolerance=0)
    assert one.is_same_answer(answer("20 31 49"), tolerance=0.01)
    assert not one.is_same_answer(answer("20 32 48"), tolerance=0.01)
    assert one.is_same_answer(answer("0 100", score=0.795), tolerance=0.01)  # as likely: a tie
    assert not one.is_same_answer(answer("0 100", score=0.7), tolerance=0.01)
    assert not one.is_same_answer(msgspec.structs.replace(one, masks=()), tolerance=1)
    assert one.overlaps(answer("20 15 65"))[0] == 0.5
