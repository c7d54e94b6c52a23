from __future__ import annotations

import pytest

from edgevlm.data.labels import FoundLabel, match_labels, own_classes
from edgevlm.errors import DataError

IMAGENET_LIKE = (
    "tench, Tinca tinca",
    "great white shark, white shark",
    "maillot",
    "maillot, tank suit",
    "hen_of-woods",
)
PLACEHOLDERS = ("LABEL_0", "LABEL_1", "LABEL_2")


def named(*names: str) -> list[FoundLabel]:
    return [FoundLabel(name=name) for name in names]


def match(found: list[FoundLabel], labels: tuple[str, ...] = IMAGENET_LIKE) -> tuple[int, ...]:
    return match_labels(found, labels, source="'data'")


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("tench, Tinca tinca", 0),
        ("TENCH", 0),
        ("tinca_tinca", 0),
        ("white-shark", 1),
        ("Great_White_Shark", 1),
        ("maillot", 2),  # the full label before a synonym of another
        ("maillot, tank suit", 3),
        ("tank suit", 3),
        ("hen of woods", 4),
    ],
)
def test_a_name_matches_by_any_spelling(name: str, index: int) -> None:
    assert match(named(name)) == (index,)


def test_the_order_of_the_data_set_does_not_matter() -> None:
    assert match(named("dog", "cat", "dog"), ("cat", "dog")) == (1, 0, 1)


def test_wordnet_ids_match_through_their_names() -> None:
    labels = ("goldfish, Carassius auratus", "tench, Tinca tinca")
    assert match(named("n01440764", "n01443537_goldfish"), labels) == (1, 0)


def test_a_wordnet_id_in_the_label_itself_decides() -> None:
    labels = ("crane (n03126707)", "crane (n02012849)")
    assert match(named("n02012849", "n03126707"), labels) == (1, 0)
    with pytest.raises(DataError, match=r"'crane' .* may be the model's class 0 .* or 1"):
        match(named("crane"), labels)
    assert match([FoundLabel(name="crane", index=1)], labels) == (1,)


def test_two_cranes_among_a_thousand_classes_keep_their_usual_places() -> None:
    from edgevlm.data.labels import _imagenet

    labels = tuple(_imagenet().values())
    assert len(labels) == 1000
    assert match(named("n02012849", "n03126707", "n01440764"), labels) == (134, 517, 0)
    assert match(named("n02012849", "n03126707", "n01440764"), ("background", *labels)) == (135, 518, 1)


def test_names_that_match_nothing_are_refused_with_the_nearest() -> None:
    with pytest.raises(DataError) as error:
        match(named("cat", "dgo", "horse"), ("cat", "dog"))
    assert "2 of 3 class names of 'data' match no class of the model: 'dgo', 'horse'" in error.value.message
    assert "'dgo' is nearest to 'dog'" in error.value.message


def test_an_index_that_contradicts_its_name_is_refused() -> None:
    with pytest.raises(DataError, match=r"gives 'dog' the index 0, which is 'cat'; in the model it is 1"):
        match([FoundLabel(name="dog", index=0)], ("cat", "dog"))


def test_the_data_sets_own_numbering_does_not_contradict() -> None:
    assert match([FoundLabel(name="dog", index=0, index_is_own=True)], ("cat", "dog")) == (1,)


def test_indices_are_taken_where_there_are_no_names() -> None:
    assert match([FoundLabel(index=1), FoundLabel(index=0)], ("cat", "dog")) == (1, 0)
    assert match(named("1", "0"), ("cat", "dog")) == (1, 0)
    assert match(named("10", "2"), ("2", "10")) == (1, 0), "numbers that are the model's names are names"


@pytest.mark.parametrize(("indices", "hint"), [((0, 2), "names"), ((-1, 1), "names"), ((1, 2), "from 0")])
def test_an_index_out_of_range_is_refused(indices: tuple[int, ...], hint: str) -> None:
    with pytest.raises(DataError, match=r"the model's 2 classes are 0 to 1") as error:
        match([FoundLabel(index=i) for i in indices], ("cat", "dog"))
    assert hint in error.value.hint


def test_a_number_that_contradicts_its_index_is_refused() -> None:
    with pytest.raises(DataError, match="gives the class '3' the index 1"):
        match([FoundLabel(name="3", index=1)], PLACEHOLDERS)


def test_placeholders_match_numbers_and_themselves_but_no_names() -> None:
    assert match(named("LABEL_2", "LABEL_0"), PLACEHOLDERS) == (2, 0)
    assert match(named("2", "0"), PLACEHOLDERS) == (2, 0)
    assert match([FoundLabel(name="cat", index=2, index_is_own=True)], PLACEHOLDERS) == (2,)
    with pytest.raises(DataError, match="classes have no names"):
        match(named("cat", "dog"), PLACEHOLDERS)


def test_some_names_missing_is_refused() -> None:
    with pytest.raises(DataError, match="have a class name and some do not"):
        match([FoundLabel(name="cat"), FoundLabel(index=1)], ("cat", "dog"))


def test_own_classes_are_numbered_by_name() -> None:
    assert own_classes(named("dog", "cat", "dog")) == (("cat", "dog"), (1, 0, 1))
    assert own_classes([FoundLabel(index=10), FoundLabel(index=9)]) == (("9", "10"), (1, 0))
