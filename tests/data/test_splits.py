from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.data.data_set import DataSet, Sample
from edgevlm.data.splits import MIN_PICTURES, Splits, split, split_apart
from edgevlm.errors import DataError


def sample(content: object, *, label: int | None = None, name: str = "") -> Sample:
    digest = hashlib.sha256(str(content).encode()).hexdigest()
    return Sample(name=name or str(content), label=label, digest=digest, read=lambda: b"")


def data_set(sizes: list[int], *, name: str = "data") -> DataSet:
    """So many pictures of each class."""
    samples = [sample(f"{name} {c} {i}", label=c) for c, n in enumerate(sizes) for i in range(n)]
    return DataSet(name=name, samples=tuple(samples))


def parts(splits: Splits) -> dict[str, set[str]]:
    return {
        part: {sample.digest for sample in getattr(splits, part).samples} for part in ("calibrate", "select", "report")
    }


def sizes_of(splits: Splits) -> tuple[int, int, int]:
    return len(splits.calibrate), len(splits.select), len(splits.report)


class_sizes = st.lists(st.integers(1, 60), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) >= MIN_PICTURES)


@given(class_sizes, st.integers(1, 200), st.integers(0, 5))
@settings(deadline=None)
def test_parts_share_nothing_and_leave_nothing(sizes: list[int], n_calibrate: int, seed: int) -> None:
    data = data_set(sizes)
    made = parts(split(data, n_calibrate=n_calibrate, seed=seed))
    assert sum(map(len, made.values())) == len(data)
    assert set.union(*made.values()) == {sample.digest for sample in data.samples}


@given(class_sizes, st.integers(0, 5))
@settings(deadline=None)
def test_each_part_holds_each_class_in_proportion(sizes: list[int], seed: int) -> None:
    data = data_set(sizes)
    splits = split(data, n_calibrate=100, seed=seed)
    for part in (splits.calibrate, splits.select, splits.report):
        found = Counter(sample.label for sample in part.samples)
        for label, n in enumerate(sizes):
            # Each cut may round every class by one, and the cut itself moves by as much.
            assert abs(found[label] - n * len(part) / len(data)) < 3


@given(class_sizes, st.integers(0, 5), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_names_and_order_do_not_matter(sizes: list[int], seed: int, random) -> None:  # type: ignore[no-untyped-def]
    data = data_set(sizes)
    shuffled = [sample_with(each, name=f"other {i}") for i, each in enumerate(data.samples)]
    random.shuffle(shuffled)
    first, second = (split(each, n_calibrate=50, seed=seed) for each in (data, data.only(shuffled)))
    assert [s.digest for s in first.report.samples] == [s.digest for s in second.report.samples]
    assert parts(first) == parts(second)


def sample_with(old: Sample, *, name: str) -> Sample:
    return Sample(name=name, label=old.label, digest=old.digest, read=old.read)


@pytest.mark.parametrize("sizes", [[1000], [100] * 10, [1] * 500, [300, 20, 5, 1]])
def test_one_more_picture_moves_few(sizes: list[int]) -> None:
    data = data_set(sizes)
    more = data.only([*data.samples, sample("new", label=0)])
    before, after = (parts(split(each, n_calibrate=100)) for each in (data, more))
    moved = sum(len(before[part] - after[part]) for part in before)
    assert moved <= 4, "at most two at each of the two cuts"


def test_equal_pictures_stay_together() -> None:
    base = data_set([60])
    twins = [sample_with(each, name=f"copy of {each.name}") for each in base.samples[::3]]
    splits = split(base.only([*base.samples, *twins]), n_calibrate=12)
    made = parts(splits)
    assert not (
        made["calibrate"] & made["select"] or made["calibrate"] & made["report"] or made["select"] & made["report"]
    )
    assert sum(sizes_of(splits)) == 80


def test_equal_pictures_with_different_labels_are_warned_of() -> None:
    data = data_set([30, 30])
    twin = sample("data 0 0", label=1, name="copy")
    warnings = split(data.only([*data.samples, twin]), n_calibrate=10).warnings
    assert warnings == ("1 pictures of 'data' stand there twice with different labels; the first is 'data 0 0'.",)


@pytest.mark.parametrize(
    ("n", "n_calibrate", "expected"),
    [(500, 100, (100, 200, 200)), (1000, 100, (100, 450, 450)), (20, 100, (4, 8, 8)), (101, 200, (20, 40, 41))],
)
def test_sizes(n: int, n_calibrate: int, expected: tuple[int, int, int]) -> None:
    assert sizes_of(split(data_set([n]), n_calibrate=n_calibrate)) == expected


def test_evaluation_can_be_capped() -> None:
    assert sizes_of(split(data_set([5000]), n_calibrate=100, n_evaluate=1000)) == (100, 1000, 1000)


def test_another_seed_is_another_cut() -> None:
    data = data_set([200])
    assert parts(split(data, n_calibrate=40, seed=1)) != parts(split(data, n_calibrate=40, seed=2))


def test_too_few_pictures() -> None:
    with pytest.raises(DataError, match="'data' has 19 different pictures, expected at least 20"):
        split(data_set([19]), n_calibrate=10)
    one = data_set([1])
    with pytest.raises(DataError, match="has 1 different pictures"):
        split(one.only(one.samples * 40), n_calibrate=10)


def test_calibration_data_of_its_own() -> None:
    splits = split_apart(data_set([300], name="ours"), data_set([100], name="theirs"), n_calibrate=128)
    assert sizes_of(splits) == (128, 50, 50)
    assert splits.source == "theirs and ours"
    assert splits.warnings == ()


def test_pictures_in_both_are_left_out_of_the_evaluation() -> None:
    ours, theirs = data_set([100], name="ours"), data_set([100], name="theirs")
    mixed = theirs.only([*theirs.samples, *(sample_with(each, name="renamed") for each in ours.samples[:30])])
    splits = split_apart(ours, mixed, n_calibrate=20)
    assert sizes_of(splits) == (20, 50, 50)
    assert "30 of 130 pictures of 'theirs' are in the calibration data 'ours' too" in splits.warnings[0]
    with pytest.raises(DataError, match=r"has 0 different pictures \(100 more are in the calibration data too\)"):
        split_apart(ours, ours, n_calibrate=20)
