from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgevlm.errors import EdgeVLMError, ModelError, UsageError
from edgevlm.ingest import kind_of, read_labels, read_model
from tests.ingest.layouts import PREPROCESSOR, write_folder, write_json


def refused(kind: type[EdgeVLMError], *args: Any, **kwargs: Any) -> EdgeVLMError:
    with pytest.raises(EdgeVLMError) as caught:
        read_model(*args, **kwargs)
    assert type(caught.value) is kind
    assert caught.value.hint, "every error says how to mend it"
    assert "\n" not in caught.value.message
    return caught.value


def test_a_folder_says_what_it_is(tmp_path: Path):
    folder = write_folder(tmp_path / "vit")
    (folder / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\n# ViT\n", encoding="utf-8")
    model = read_model(str(folder))
    assert (model.name, model.task, model.family) == ("vit", "image-classification", "image_classifier")
    assert model.labels == ("cat", "dog", "crane")
    assert model.source.licence == "apache-2.0"
    assert model.graphs[0].inputs[0].shape == ("batch", 3, 32, 32)
    assert model.graphs[0].outputs == ("logits",)


def test_the_digest_is_of_contents_and_not_of_names(tmp_path: Path):
    one = read_model(str(write_folder(tmp_path / "one"))).source
    two = read_model(str(write_folder(tmp_path / "two"))).source
    assert (one.digest, one.weights_sha256) == (two.digest, two.weights_sha256)


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_one_changed_byte_changes_the_digest(tmp_path: Path, changed: str):
    folder = write_folder(tmp_path)
    before = read_model(str(folder)).source.digest
    path = folder / changed
    if changed == "model.safetensors":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    else:
        path.write_text(path.read_text(encoding="utf-8").replace("32", "64"), encoding="utf-8")
        other = "config.json" if changed.startswith("pre") else "preprocessor_config.json"
        (folder / other).write_text((folder / other).read_text(encoding="utf-8").replace("32", "64"), encoding="utf-8")
    assert read_model(str(folder)).source.digest != before


def test_another_size_changes_the_digest_and_warns(tmp_path: Path):
    folder = write_folder(tmp_path)
    model = read_model(str(folder), image_size=64)
    assert model.graphs[0].inputs[0].shape == ("batch", 3, 64, 64)
    assert model.source.digest != read_model(str(folder)).source.digest
    assert "64×64" in model.warnings[0]
    assert read_model(str(folder), image_size=32).warnings == ()


def test_reading_loads_neither_torch_nor_transformers(tmp_path: Path):
    folder = write_folder(tmp_path)
    code = (
        "import sys; from edgevlm.ingest import read_model; read_model(sys.argv[1]);"
        "print(sorted({'torch', 'transformers', 'onnx', 'huggingface_hub'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_nested_processors_win_as_in_transformers(tmp_path: Path):
    folder = write_folder(tmp_path, image_size=48)
    write_json(folder / "processor_config.json", {"image_processor": {**PREPROCESSOR, "size": 48}})
    assert read_model(str(folder)).processing.image.height == 48


def test_shards_are_read_by_their_index(tmp_path: Path):
    folder = write_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write_json(folder / "model.safetensors.index.json", {"weight_map": names})
    assert len(read_model(str(folder)).source.weights_sha256) == 64
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "names the shard 'model-00002" in refused(ModelError, str(folder)).message
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "../model.safetensors"}})
    assert "names the shard '../model" in refused(ModelError, str(folder)).message


# --- what is refused --------------------------------------------------------------------------------------


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_folder(tmp_path / "mobilenet-v2")
    monkeypatch.chdir(tmp_path)
    error = refused(ModelError, "mobilenet-v3")
    assert "no folder 'mobilenet-v3'" in error.message
    assert "'mobilenet-v2'" in error.hint
    assert "'demo'" in refused(ModelError, "demmo").hint
    assert "There is no model" in refused(UsageError, str(tmp_path / "mobilenet-v3")).message
    assert "not an ONNX file" in refused(UsageError, str(tmp_path / "mobilenet-v2" / "config.json")).message


def test_no_such_task(tmp_path: Path):
    folder = str(write_folder(tmp_path))
    assert refused(UsageError, folder, task="image-clasification").hint.startswith(
        "Did you mean 'image-classification'"
    )
    error = refused(UsageError, folder, task="zero-shot-image-classification")
    assert "cannot do zero-shot-image-classification" in error.message
    assert error.hint == "Use --task image-classification."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "has no 'architectures'"),
        ({"architectures": []}, "has no 'architectures'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized already (gptq)"),
        ({"pretrained_cfg": {}}, "is a timm checkpoint"),
        ({"image_size": 64}, "takes 64×64 pictures, and 32×32 is what its preprocessing makes"),
        ({"id2label": {"0": "cat", "2": "dog"}}, "does not number its 2 labels"),
        ({"id2label": {"a": "cat"}}, "keys are not numbers"),
        ({"architectures": ["NoSuchModel"], "auto_map": {"AutoModel": "x.Y"}}, "brings its own code"),
    ],
)
def test_a_configuration_that_cannot_be_used(tmp_path: Path, changes: dict[str, Any], message: str):
    assert message in refused(ModelError, str(write_folder(tmp_path, **changes))).message


def test_own_code_of_an_unknown_kind_is_refused_even_when_trusted(tmp_path: Path):
    folder = write_folder(tmp_path, architectures=["NoSuchModel"], auto_map={"AutoModel": "x.Y"})
    assert "edgevlm calls none" in refused(ModelError, str(folder), trust_remote_code=True).message


def test_own_code_beside_a_known_class_is_not_run(tmp_path: Path):
    folder = write_folder(tmp_path, auto_map={"AutoModelForImageClassification": "evil.Model"})
    model = read_model(str(folder))
    assert model.source.options["auto_class"] is None
    assert "Transformers' class of the same name" in model.warnings[0]


def test_an_architecture_of_another_task_says_which(tmp_path: Path):
    error = refused(ModelError, str(write_folder(tmp_path, architectures=["LlamaForCausalLM"])))
    assert "is for text-generation; edgevlm compiles image-classification" in error.message
    near = refused(ModelError, str(write_folder(tmp_path, architectures=["PerceiverForImageClassificationLearned"])))
    assert "is an image-classification model of an architecture that edgevlm does not know" in near.message
    unknown = refused(ModelError, str(write_folder(tmp_path, architectures=["NoSuchModel"])))
    assert "is no model that edgevlm knows" in unknown.message


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_missing_file(tmp_path: Path, name: str):
    folder = write_folder(tmp_path)
    (folder / name).unlink()
    messages = {
        "config.json": "has no config.json",
        "preprocessor_config.json": "has no preprocessor_config.json",
        "model.safetensors": "holds no weights",
    }
    assert messages[name] in refused(ModelError, str(folder)).message


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\x00\x01", '"vit"'])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_json_that_is_none(tmp_path: Path, name: str, text: str):
    folder = write_folder(tmp_path)
    (folder / name).write_text(text, encoding="utf-8")
    assert name in refused(ModelError, str(folder)).message


@pytest.mark.parametrize("n_bytes", [0, 4, 40, -1])
def test_truncated_safetensors(tmp_path: Path, n_bytes: int):
    folder = write_folder(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:n_bytes])
    assert "is not a whole safetensors file" in refused(ModelError, str(folder)).message


def test_a_pickle_needs_the_flag(tmp_path: Path):
    folder = write_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not read before the flag is given")
    error = refused(ModelError, str(folder))
    assert "only as a pickle" in error.message
    assert "--allow-pickle" in error.hint
    model = read_model(str(folder), allow_pickle=True)
    assert model.source.options["is_pickle"]
    assert model.warnings == ("The weights were read from a pickle.",)


def test_sizes_that_the_weights_do_not_allow(tmp_path: Path):
    folder = str(write_folder(tmp_path))
    assert "multiple of its patch size, 8" in refused(ModelError, folder, image_size=36).hint
    assert "image size of 0" in refused(UsageError, folder, image_size=0).message
    fixed = str(write_folder(tmp_path, architectures=["BeitForImageClassification"]))
    assert "64×64 was asked for" in refused(ModelError, fixed, image_size=64).message


def test_labels_must_be_as_many_as_classes(tmp_path: Path):
    folder = str(write_folder(tmp_path))
    assert read_model(folder, labels=("a", "b", "c")).labels == ("a", "b", "c")
    assert "2 labels were given" in refused(UsageError, folder, labels=("a", "b")).message
    tower = str(write_folder(tmp_path, architectures=["ViTModel"]))
    assert "has none" in refused(UsageError, tower, labels=("a",)).message


def test_a_card_is_for_models_without_a_configuration(tmp_path: Path):
    assert "says for itself" in refused(UsageError, str(write_folder(tmp_path)), card="x.toml").message


# --- two towers -------------------------------------------------------------------------------------------


def two_towers(folder: Path) -> Path:
    write_folder(
        folder,
        config={
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "vision_config": {"image_size": 32, "patch_size": 8},
            "text_config": {"max_position_embeddings": 9, "pad_token_id": 1},
        },
    )
    from tests.families.checkpoints import write_tokenizer

    write_tokenizer(folder)
    return folder


def test_two_towers_have_two_graphs_and_a_tokenizer(tmp_path: Path):
    model = read_model(str(two_towers(tmp_path)), labels=("cat", "dog"))
    assert model.task == "zero-shot-image-classification"
    assert [graph.name for graph in model.graphs] == ["image_encoder", "text_encoder"]
    assert model.graphs[1].inputs[0].shape == ("batch", "sequence"), "a claim that the export proves"
    assert model.processing.text is not None
    assert (model.processing.text.max_length, model.processing.text.padding) == (9, "max_length")
    assert model.processing.text.pad_token_id == 0, "the tokenizer's own pad token goes before the configuration's"
    assert model.labels == ("cat", "dog")
    assert model.source.digest == read_model(str(tmp_path)).source.digest, "labels are an input of the compile"


def test_two_towers_need_their_tokenizer(tmp_path: Path):
    folder = two_towers(tmp_path)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert "is not a tokenizer" in refused(ModelError, str(folder)).message
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(ModelError, str(folder)).message


def test_a_tokenizer_without_padding(tmp_path: Path):
    folder = two_towers(tmp_path)
    write_json(folder / "tokenizer_config.json", {})
    assert read_model(str(folder)).processing.text.pad_token_id == 1  # type: ignore[union-attr]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["text_config"]["pad_token_id"]
    write_json(folder / "config.json", config)
    assert "which token pads" in refused(ModelError, str(folder)).message


def siglip(folder: Path, normalizer: Any) -> Path:
    """A SigLIP checkpoint with a tokenizer of five words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    towers = {"vision_config": {"image_size": 32, "patch_size": 8}, "text_config": {}}
    write_folder(folder, config={"architectures": ["SiglipModel"], "model_type": "siglip", **towers})
    words = ["</s>", "<unk>", "a", "photo", "cat"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"pad_token": "</s>"})
    return folder


def test_siglip_wants_canonical_texts(tmp_path: Path):
    from tokenizers import Regex, normalizers

    lower, bare = normalizers.Lowercase(), normalizers.Replace(Regex("[[:punct:]]"), "")
    text = read_model(str(siglip(tmp_path / "good", normalizers.Sequence([lower, bare])))).processing.text
    assert text is not None
    assert (text.max_length, text.pad_token_id) == (64, 0)
    error = refused(ModelError, str(siglip(tmp_path / "cased", bare)))
    assert "lowers the case of a text and drops its punctuation" in error.message
    refused(ModelError, str(siglip(tmp_path / "dotted", lower)))


def test_siglip_saved_without_a_tokenizer_that_a_device_can_read(tmp_path: Path):
    folder = siglip(tmp_path, None)
    (folder / "tokenizer.json").rename(folder / "spiece.model")
    error = refused(ModelError, str(folder))
    assert "has no tokenizer.json" in error.message
    assert error.hint == "Copy it from the checkpoint that this one was trained from."


# --- names ------------------------------------------------------------------------------------------------


def test_what_a_name_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert kind_of("demo") == "demo"
    assert kind_of("nets/x.onnx") == "onnx_file"
    assert kind_of("nets.mine:make") == "torch_module"
    assert kind_of("google/vit-base-patch16-224") == "hugging_face"
    (tmp_path / "demo").mkdir()
    assert kind_of("demo") == "demo", "a bundle that was written to ./demo does not hide the built-in model"
    (tmp_path / "demo" / "config.json").touch()
    assert kind_of("demo") == "hugging_face", "a checkpoint's folder is never taken for something else"
    with pytest.raises(UsageError):
        kind_of("a b c")


def test_labels_from_a_file_or_a_line(tmp_path: Path):
    file = tmp_path / "labels.txt"
    file.write_text("cat\n\n dog \n", encoding="utf-8")
    assert read_labels(str(file)) == ("cat", "dog")
    assert read_labels("red circle, blue square") == ("red circle", "blue square")
    for text in (" , ", "cat,dog,cat"):
        with pytest.raises(UsageError):
            read_labels(text)


@pytest.mark.assets
def test_mobilenet(assets: Path):
    model = read_model(str(assets / "models" / "mobilenet-v2-imagenet"))
    assert model.source.weights_sha256 == "48c4c0e9a2cf247569780a60ba9981aedc4b36e946e63bb803bc2afb095a5ea5"
    assert len(model.labels) == 1000
    assert (model.processing.image.height, model.processing.image.width) == (224, 224)
