from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from edgevlm.data import content
from edgevlm.data.data_set import DataSet
from edgevlm.data.labels import FoundLabel, match_labels
from edgevlm.data.readers import read_data_set
from edgevlm.errors import DataError, MissingToolError
from tests.data.pictures import png, write, write_folders, write_table

TASK = "image-classification"
LABELS = ("cat", "dog", "bird")


def read(path: Path | str, labels: tuple[str, ...] = LABELS, task: str = TASK, cache: Path | None = None) -> DataSet:
    return read_data_set(path, labels=labels, task=task, cache=cache)


def labels_by_name(data: DataSet) -> dict[str, int | None]:
    return {sample.name: sample.label for sample in data.samples}


# --- folders ----------------------------------------------------------------------------------------------


def test_folders_by_class(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "pets", {"Dog": 2, "cat": 1})
    write(root / ".DS_Store", b"x")
    write(root / "cat" / "._000.png", b"not a picture")
    write(root / "__MACOSX" / "a.png", b"not a picture")
    write(root / "readme.txt", b"hello")
    (root / "empty").mkdir()
    data = read(root)
    assert data.name == "pets"
    assert labels_by_name(data) == {"Dog/000.png": 1, "Dog/001.png": 1, "cat/000.png": 0}
    assert data.has_labels
    assert data.samples[0].read() == (root / "Dog" / "000.png").read_bytes()


def test_pictures_deep_inside_a_class_folder(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write(tmp_path / name / "images" / "0.png", png(seed=len(name)))
    write(tmp_path / "dog" / "images" / "1.png", png(seed=9))
    assert labels_by_name(read(tmp_path)) == {"cat/images/0.png": 0, "dog/images/0.png": 1, "dog/images/1.png": 1}


def test_of_several_splits_the_held_out_one_is_taken_and_named(tmp_path: Path) -> None:
    for split, n in (("train", 3), ("val", 2)):
        write_folders(tmp_path / "pets" / split, {"cat": n, "dog": n})
    data = read(tmp_path / "pets")
    assert (data.name, len(data)) == ("pets/val", 4)
    assert data.notes == ("'pets' has several splits: 'val' is used, train not.",)
    assert len(read(tmp_path / "pets" / "train")) == 6


def test_a_class_called_train_is_no_split(tmp_path: Path) -> None:
    root = write_folders(tmp_path, {"train": 1, "bus": 1})
    assert set(labels_by_name(read(root, ("bus", "train"))).values()) == {0, 1}


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    write(tmp_path / "b.png", png(seed=1))
    write(tmp_path / "a.JPG", png(seed=2))
    data = read(tmp_path)
    assert [sample.name for sample in data.samples] == ["a.JPG", "b.png"]
    assert not data.has_labels


def test_pictures_beside_class_folders_are_refused(tmp_path: Path) -> None:
    write(write_folders(tmp_path, {"cat": 1, "dog": 1}) / "loose.png", png())
    with pytest.raises(DataError, match="1 pictures beside 2 folders"):
        read(tmp_path)


def test_empty_and_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no pictures"):
        read(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="There is no data set") as error:
        read(tmp_path / "photso")
    assert error.value.hint == "Did you mean 'photos'?"


def test_one_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is of one class, 'cat'"):
        read(write_folders(tmp_path, {"cat": 3}))


def test_folders_that_name_no_class_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 2 class names of 'pets' match no class of the model: 'brid'"):
        read(write_folders(tmp_path / "pets", {"cat": 1, "brid": 1}))


# --- what pictures hold -----------------------------------------------------------------------------------


def jpeg(n_bytes: int | None = None) -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.open(io.BytesIO(png(size=64))).save(file, "JPEG")
    return file.getvalue()[:n_bytes]


@pytest.mark.parametrize(
    ("broken", "problem"),
    [(b"", "empty"), (b"hello", "not a picture"), (jpeg(-400), "truncated"), (png()[:-200], "truncated")],
)
def test_unreadable_pictures_are_refused_with_a_count_and_the_first(
    tmp_path: Path, broken: bytes, problem: str
) -> None:
    root = write_folders(tmp_path, {"cat": 2, "dog": 2})
    write(root / "dog" / "b.jpg", broken)
    write(root / "dog" / "a.jpg", broken)
    with pytest.raises(DataError) as error:
        read(root)
    assert "2 of 6 pictures cannot be read; the first is" in error.value.message
    assert "a.jpg" in error.value.message
    assert problem in error.value.message


def test_the_digest_follows_contents_and_labels_only(tmp_path: Path) -> None:
    first = read(write_folders(tmp_path / "a", {"cat": 2, "dog": 2}))
    again = write_folders(tmp_path / "b", {"cat": 2, "dog": 2})
    (again / "cat" / "000.png").rename(again / "cat" / "zzz.png")
    assert read(again).digest == first.digest
    (again / "cat" / "zzz.png").rename(again / "dog" / "zzz.png")
    assert read(again).digest != first.digest, "another label"
    changed = write_folders(tmp_path / "c", {"cat": 2, "dog": 2})
    write(changed / "cat" / "000.png", png(seed=77))
    assert read(changed).digest != first.digest, "another picture"


def test_known_digests_are_looked_up_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_SETTLED_NS", -(10**12))
    root, cache = write_folders(tmp_path / "pets", {"cat": 2, "dog": 2}), tmp_path / "cache"
    seen: list[int] = []
    digest_of = content.digest_of
    monkeypatch.setattr(content, "digest_of", lambda data: seen.append(1) or digest_of(data))
    first = read(root, cache=cache)
    assert len(seen) == 4
    assert read(root, cache=cache).digest == first.digest
    assert len(seen) == 4, "nothing was read again"
    write(root / "cat" / "000.png", png(seed=5))
    assert read(root, cache=cache).digest != first.digest
    assert len(seen) == 5, "only what changed"
    for file in cache.iterdir():
        file.write_bytes(b"damaged")
    read(root, cache=cache)
    assert len(seen) == 9


def test_a_file_written_just_now_is_not_trusted(tmp_path: Path) -> None:
    read(write_folders(tmp_path / "pets", {"cat": 2, "dog": 2}), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_SETTLED_NS", -(10**12))
    write(tmp_path / "file", b"not a folder")
    with pytest.raises(NotADirectoryError):
        (tmp_path / "file" / "x").mkdir()
    assert len(read(write_folders(tmp_path / "pets", {"cat": 2, "dog": 2}), cache=tmp_path / "file" / "cache")) == 4


# --- tables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        ("file,class_index,name", ["a.png,1,dog", "b.png,0,cat"]),
        ("path,label", ["a.png,dog", "b.png,cat"]),
        ("image,label", ["a.png,1", "b.png,0"]),
        ("file_name,class_index", ["a.png,1", "b.png,0"]),
        ("Filename,Class", ["a.png,Dog", "b.png,CAT"]),
    ],
)
def test_tables(tmp_path: Path, header: str, rows: list[str]) -> None:
    root = write_table(tmp_path / "pets", header, rows).parent
    assert labels_by_name(read(root)) == {"a.png": 1, "b.png": 0}
    assert labels_by_name(read(root / "labels.csv")) == {"a.png": 1, "b.png": 0}


def test_tab_separated_with_a_byte_order_mark_and_quotes(tmp_path: Path) -> None:
    write_table(tmp_path, "\ufefffile\tname", ['a.png\t"tench, Tinca tinca"', "b.png\tdog"], file="labels.tsv")
    assert labels_by_name(read(tmp_path, ("dog", "tench, Tinca tinca"))) == {"a.png": 1, "b.png": 0}


def test_a_table_without_labels(tmp_path: Path) -> None:
    assert not read(write_table(tmp_path, "file", ["a.png", "b.png"]).parent).has_labels


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("file,class_index,name", ["a.png,0,dog", "b.png,0,cat"], "gives 'dog' the index 0, which is 'cat'"),
        ("file,class_index", ["a.png,0", "b.png,7"], "indices from 0 to 7"),
        ("file,class_index", ["a.png,0", "b.png,one"], "has 'one' in its column 'class_index'"),
        ("file,name", ["a.png,cat", "b.png,"], "Row 3 of .* has nothing in its column 'name'"),
        ("file,name", [], "has no rows"),
        ("file,xmin,ymin,xmax,ymax,class", ["a.png,1,1,2,2,cat"], "holds boxes, but image-classification needs"),
        ("file,caption", ["a.png,a cat", "b.png,a dog"], "holds captions"),
        ("file,question,answer", ["a.png,what?,a dog"], "holds questions and answers"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, header: str, rows: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write_table(tmp_path, header, rows))


def test_a_table_that_lists_missing_pictures(tmp_path: Path) -> None:
    file = write_table(tmp_path, "file,name", ["a.png,cat", "b.png,dog"])
    (tmp_path / "images" / "b.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 pictures .* are not there; the first is 'b.png'"):
        read(file)


def test_of_several_tables_the_held_out_one_is_taken(tmp_path: Path) -> None:
    write_table(tmp_path, "file,name", ["a.png,cat", "b.png,dog"], file="train_labels.csv")
    write_table(tmp_path, "file,name", ["c.png,cat", "d.png,bird"], file="val_labels.csv")
    write(tmp_path / "words.csv", b"class_index,wnid\n0,n01443537\n")
    data = read(tmp_path)
    assert labels_by_name(data) == {"c.png": 0, "d.png": 2}
    assert "'val_labels.csv' is used, 'train_labels.csv' is not." in data.notes[0]
    (tmp_path / "val_labels.csv").rename(tmp_path / "other.csv")
    (tmp_path / "train_labels.csv").rename(tmp_path / "more.csv")
    with pytest.raises(DataError, match=r"several tables of pictures: 'more.csv', 'other.csv'"):
        read(tmp_path)


# --- other tasks, and no data sets at all -----------------------------------------------------------------


def coco(**annotation: object) -> bytes:
    return json.dumps({"images": [{"id": 1, "file_name": "a.png"}], "annotations": [annotation]}).encode()


@pytest.mark.parametrize(
    ("file", "text", "kind"),
    [
        ("instances.json", coco(bbox=[1, 2, 3, 4]), "boxes"),
        ("annotations/instances_val.json", coco(bbox=[1, 2, 3, 4], segmentation=[[1, 2]]), "boxes and masks"),
        ("captions.json", coco(caption="a cat"), "captions"),
        ("captions.jsonl", b'{"file": "a.png", "captions": ["a cat"]}\n', "captions"),
        ("questions.json", b'[{"file": "a.png", "question": "what?", "answer": "cat"}]', "questions and answers"),
        ("labels/a.txt", b"0 0.5 0.5 0.1 0.1", "boxes"),
        ("Annotations/a.xml", b"<annotation/>", "boxes"),
        ("masks/a.png", png(), "masks"),
    ],
)
def test_a_data_set_of_another_task_is_refused_in_one_sentence(
    tmp_path: Path, file: str, text: bytes, kind: str
) -> None:
    write(tmp_path / "images" / "a.png", png(seed=1))
    write(tmp_path / "images" / "b.png", png(seed=2))
    write(tmp_path / file, text)
    with pytest.raises(DataError, match=f"holds {kind} .*but image-classification needs pictures with one") as error:
        read(tmp_path)
    assert f"Pass '{tmp_path / 'images'}'" in error.value.hint
    assert len(read(tmp_path / "images")) == 2, "what the hint says works"


def test_a_stray_json_is_no_other_task(tmp_path: Path) -> None:
    root = write_folders(tmp_path, {"cat": 1, "dog": 1})
    write(root / "info.json", b'{"author": "me", "licence": "CC0"}')
    assert len(read(root)) == 2


@pytest.mark.parametrize(
    ("file", "message"),
    [("a.png", "is one picture"), ("a.zip", "is an archive"), ("a.py", "is a '.py' file"), ("b.csv", "no column")],
)
def test_files_that_are_no_data_set(tmp_path: Path, file: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / file, b"a,b\n1,2\n"))


# --- the built-in shapes ----------------------------------------------------------------------------------


def test_shapes_are_labelled_where_the_model_knows_them() -> None:
    from edgevlm.data.shapes import class_names

    known = read_data_set("shapes", labels=tuple(reversed(class_names())), task=TASK, n_shapes=30)
    assert known.is_synthetic
    assert known.has_labels
    stranger = read_data_set("shapes", labels=LABELS, task=TASK, n_shapes=30, shapes_size=48)
    assert stranger.is_synthetic
    assert not stranger.has_labels
    picture = stranger.samples[3].read()
    assert not isinstance(picture, bytes)
    assert picture.shape == (48, 48, 3)
    assert len({sample.digest for sample in known.samples} | {sample.digest for sample in stranger.samples}) == 60
    free = read_data_set("shapes", task="zero-shot-image-classification", n_shapes=30)
    assert free.class_names == class_names()
    assert free.has_labels


def test_shapes_carry_the_label_of_what_is_drawn() -> None:
    from edgevlm.data import readers, shapes

    data = read_data_set("shapes", labels=shapes.class_names(), task=TASK, n_shapes=20, shapes_size=96)
    for i, sample in enumerate(data.samples):
        shown = shapes.picture(i, seed=readers._SHAPES_SEED, size=96)
        assert sample.label is not None
        assert shapes.class_names()[sample.label] == shown.label
        assert (sample.read() == shown.image).all()


# --- Hugging Face -----------------------------------------------------------------------------------------


def hugging_face_table(labels: list[object], feature: dict[str, object], **columns: list[object]) -> object:
    pa = pytest.importorskip("pyarrow")
    pictures = [{"bytes": png(seed=i), "path": None} for i in range(len(labels))]
    table = pa.table(
        {
            "image": pa.array(pictures, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": labels,
            **columns,
        }
    )
    features = {"image": {"_type": "Image"}, "label": feature}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def save(root: Path, table: object, *, n_shards: int = 1) -> Path:
    """The layout of ``Dataset.save_to_disk``, of datasets 4 and 5."""
    pa = pytest.importorskip("pyarrow")
    names = [f"data-{i:05d}-of-{n_shards:05d}.arrow" for i in range(n_shards)]
    size = -(-table.num_rows // n_shards)  # type: ignore[attr-defined]
    root.mkdir(parents=True)
    for i, name in enumerate(names):
        with pa.OSFile(str(root / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:  # type: ignore[attr-defined]
            writer.write_table(table.slice(i * size, size))  # type: ignore[attr-defined]
    write(root / "state.json", json.dumps({"_data_files": [{"filename": name} for name in names]}).encode())
    write(root / "dataset_info.json", b"{}")
    return root


CAT_DOG = {"_type": "ClassLabel", "names": ["dog", "cat"]}


@pytest.mark.parametrize("n_shards", [1, 2])
def test_saved_to_disk(tmp_path: Path, n_shards: int) -> None:
    data = read(save(tmp_path / "pets", hugging_face_table([0, 1, 0, 1], CAT_DOG), n_shards=n_shards))
    assert [sample.label for sample in data.samples] == [1, 0, 1, 0], "matched by name, not by the data set's order"
    assert [sample.read() for sample in data.samples] == [png(seed=i) for i in range(4)]


def test_saved_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save(tmp_path / "pets" / split, hugging_face_table([0, 1], CAT_DOG))
    write(tmp_path / "pets" / "dataset_dict.json", b'{"splits": ["train", "test"]}')
    data = read(tmp_path / "pets")
    assert data.name == "pets/test"
    assert "train not" in data.notes[0]


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "pets" / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        table = hugging_face_table([0, 1, 1], CAT_DOG)
        parquet.write_table(table, tmp_path / "pets" / "data" / f"{split}-00000-of-00001.parquet")
    data = read(tmp_path / "pets")
    assert (data.name, [sample.label for sample in data.samples]) == ("pets/validation", [1, 0, 0])
    assert data.samples[2].read() == png(seed=2)
    alone = read(tmp_path / "pets" / "data" / "train-00000-of-00001.parquet")
    assert alone.digest == data.digest


def test_hugging_face_digests_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevlm.data import hugging_face

    monkeypatch.setattr(content, "_SETTLED_NS", -(10**12))
    root = save(tmp_path / "pets", hugging_face_table([0, 1], CAT_DOG))
    first = read(root, cache=tmp_path / "cache")
    monkeypatch.setattr(hugging_face, "digest_of", lambda _: pytest.fail("read again"))
    assert read(root, cache=tmp_path / "cache").digest == first.digest


def test_hugging_face_without_labels_or_of_another_task(tmp_path: Path) -> None:
    unlabelled = save(tmp_path / "a", hugging_face_table([-1, -1], CAT_DOG))
    assert not read(unlabelled).has_labels
    with pytest.raises(DataError, match="1 of 2 rows of 'b' have no label"):
        read(save(tmp_path / "b", hugging_face_table([-1, 1], CAT_DOG)))
    boxes = hugging_face_table([0, 1], CAT_DOG, objects=[["x"], ["y"]]).drop_columns(["label"])  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="'c' holds boxes"):
        read(save(tmp_path / "c", boxes))
    with pytest.raises(DataError, match=r"no pictures \(its columns are label\)"):
        read(save(tmp_path / "d", hugging_face_table([0], CAT_DOG).drop_columns(["image"])))  # type: ignore[attr-defined]


def test_a_broken_arrow_file_is_refused(tmp_path: Path) -> None:
    root = save(tmp_path / "pets", hugging_face_table([0, 1], CAT_DOG))
    write(root / "data-00000-of-00001.arrow", b"nonsense")
    with pytest.raises(DataError, match="cannot be read"):
        read(root)


def test_without_pyarrow_the_install_command_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "state.json", b'{"_data_files": [{"filename": "a.arrow"}]}')
    write(tmp_path / "a.arrow", b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingToolError, match="not installed") as error:
        read(tmp_path)
    assert "pip install" in error.value.hint


def test_what_datasets_itself_writes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    rows = {"image": [{"bytes": png(seed=i), "path": None} for i in range(4)], "label": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "pets"))
    assert [sample.label for sample in read(tmp_path / "pets").samples] == [1, 0, 1, 0]


# --- real data --------------------------------------------------------------------------------------------


@pytest.mark.assets
def test_imagenet_sample_matches_the_checkpoints_labels(assets: Path) -> None:
    config = json.loads((assets / "models/mobilenet-v2-imagenet/config.json").read_text())
    labels = tuple(config["id2label"][str(i)] for i in range(1000))
    data = read(assets / "data/imagenet-sample", labels)
    assert [sample.label for sample in data.samples] == list(range(0, 1000, 2))


@pytest.mark.assets
def test_tiny_imagenets_ids_match_imagenets_names(assets: Path) -> None:
    config = json.loads((assets / "models/mobilenet-v2-imagenet/config.json").read_text())
    labels = tuple(config["id2label"][str(i)] for i in range(1000))
    words = (assets / "data/tiny-imagenet/words.csv").read_text().replace('"', "")
    folders = sorted(folder.name for folder in (assets / "data/tiny-imagenet/train").iterdir())
    found = match_labels([FoundLabel(name=folder) for folder in folders], labels, source="tiny-imagenet")
    for folder, index in zip(folders, found, strict=True):
        # This checkpoint tells its two cranes apart by their ids.
        assert f"{folder},{labels[index].removesuffix(f' ({folder})')}\n" in words


@pytest.mark.assets
def test_cifar10_sample(assets: Path) -> None:
    classes = tuple(json.loads((assets / "models/resnet56-cifar10.json").read_text())["classes"])
    data = read(assets / "data/cifar10-sample", classes)
    assert len(data) == 1000
    assert all(sample.name.startswith(classes[sample.label or 0]) for sample in data.samples)
    with pytest.raises(DataError, match="match no class"):
        read(assets / "data/cifar10-sample")


@pytest.mark.assets
@pytest.mark.parametrize(
    ("name", "kind"), [("coco128", "boxes and masks"), ("flickr8k", "captions"), ("easy-vqa", "questions and answers")]
)
def test_real_data_of_other_tasks(assets: Path, name: str, kind: str) -> None:
    with pytest.raises(DataError, match=f"holds {kind} "):
        read(assets / f"data/{name}")
    assert not read(assets / f"data/{name}/images").has_labels
