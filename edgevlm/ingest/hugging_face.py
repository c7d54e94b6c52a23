"""A checkpoint in Hugging Face's layout, from a local folder or the hub, read as JSON and safetensors headers only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgevlm.errors import EdgeVLMError, ModelError, UsageError
from edgevlm.families import (
    CLASSIFY,
    FEATURES,
    MASKS,
    ZERO_SHOT,
    Checkpoint,
    Family,
    check_size,
    family_of,
    load_family,
)
from edgevlm.ingest.asked import Asked
from edgevlm.ingest.processing import read_image_processing
from edgevlm.ingest.weights import combined_sha256, licence_of, read_json, sha256_of, tensor_names, weight_files
from edgevlm.model import Graph, Model, Source
from edgevlm.runtime.spec import ImageProcessing, Processing, TextProcessing, to_json
from edgevlm.runtime.tasks import TASKS

# What a compile reads of a repository; everything else stays on the hub.
_WANTED = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "README.md",
    "LICENSE*",
)
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")

# Transformers' classes that load code from a checkpoint (``auto_map``), and the family whose calls fit them.
_AUTO_CLASSES = {
    "AutoModelForImageClassification": ("image_classifier", CLASSIFY),
    "AutoModelForZeroShotImageClassification": ("clip", ZERO_SHOT),
}

# Transformers' tables (``MODEL_FOR_..._MAPPING_NAMES``) of classes for tasks that edgevlm does not compile.
_TASKS_ELSEWHERE = {
    "CAUSAL_LM": "text-generation",
    "IMAGE_TEXT_TO_TEXT": "image-text-to-text",
    "OBJECT_DETECTION": "object-detection",
    "ZERO_SHOT_OBJECT_DETECTION": "zero-shot-object-detection",
    "SEMANTIC_SEGMENTATION": "image-segmentation",
    "UNIVERSAL_SEGMENTATION": "image-segmentation",
    "MASK_GENERATION": "mask-generation",
    "DEPTH_ESTIMATION": "depth-estimation",
    "VISUAL_QUESTION_ANSWERING": "visual-question-answering",
    "IMAGE_CLASSIFICATION": "image-classification",
    "SEQ_TO_SEQ_CAUSAL_LM": "text2text-generation",
    "MASKED_LM": "fill-mask",
    "SEQUENCE_CLASSIFICATION": "text-classification",
    "TOKEN_CLASSIFICATION": "token-classification",
    "QUESTION_ANSWERING": "question-answering",
    "AUDIO_CLASSIFICATION": "audio-classification",
    "SPEECH_SEQ_2_SEQ": "automatic-speech-recognition",
    "CTC": "automatic-speech-recognition",
    "VIDEO_CLASSIFICATION": "video-classification",
}

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def read_hugging_face(asked: Asked) -> Model:
    """A model from a local folder, or from the hub where there is none of that name."""
    folder = Path(asked.name)
    if folder.is_dir():
        return read_folder(asked, folder, revision=None)
    folder = _download(asked)
    return read_folder(asked, folder, revision=folder.name)


def read_folder(asked: Asked, folder: Path, *, revision: str | None, prompt_template: str | None = None) -> Model:
    """A model from a folder in Hugging Face's layout.

    Raises: ModelError: something is missing, broken or not supported. UsageError: the task does not fit.
    """
    config = _read_config(folder)
    files, is_pickle = weight_files(folder, allow_pickle=asked.allow_pickle)
    tensors = None if is_pickle else tensor_names(files)
    family_name, auto_class, architecture = _family(config, asked, folder)
    checkpoint = Checkpoint(folder=folder, config=config, architecture=architecture, tensors=tensors)
    family = load_family(family_name)
    tasks = (_AUTO_CLASSES[auto_class][1],) if auto_class else family.architectures[architecture].tasks
    task = _task(asked, tasks, architecture)
    model_type = str(config.get("model_type", ""))
    own = read_image_processing(folder, model_type=model_type, image_size=None)
    image = read_image_processing(folder, model_type=model_type, image_size=asked.image_size)
    if not auto_class:
        check_size(family, checkpoint, image, is_asked=asked.image_size is not None)
    text, tokenizer_file = _text(family, checkpoint, task, prompt_template)
    graphs = family.graphs(checkpoint, task, image)
    options = {
        "architecture": architecture,
        "auto_class": auto_class,
        "is_pickle": is_pickle,
        **family.options(checkpoint),
    }
    weights_sha256 = combined_sha256([sha256_of(file) for file in files])
    labels = _labels(asked, config, task)
    processing = Processing(image=image, text=text)
    texts = [sha256_of(Path(tokenizer_file))] if tokenizer_file else []
    code = [sha256_of(path) for path in sorted(folder.glob("*.py"))] if auto_class else []
    source = Source(
        kind=asked.kind,
        location=str(folder.resolve()),
        asked=asked.name,
        revision=revision,
        digest=digest_of(
            [weights_sha256, sha256_of(folder / "config.json"), *texts, *code],
            task,
            graphs,
            processing,
            options,
            labels,
        ),
        weights_sha256=weights_sha256,
        licence=licence_of(folder),
        options=options,
    )
    return Model(
        name=asked.name.rstrip("/").rpartition("/")[2] or folder.resolve().name,
        task=task,
        family=family_name,
        graphs=graphs,
        processing=processing,
        source=source,
        labels=labels,
        tokenizer_file=tokenizer_file,
        warnings=_warnings(config, auto_class, is_pickle, own, image),
    )


def digest_of(
    contents: list[str],
    task: str,
    graphs: tuple[Graph, ...],
    processing: Processing,
    options: Mapping[str, Any],
    labels: tuple[str, ...],
) -> str:
    """Everything that makes this model what it is. Zero-shot labels do not: they are an input of the compile."""
    chosen = [task, graphs, processing, sorted(options.items()), () if task == ZERO_SHOT else labels]
    return combined_sha256([*contents, to_json(chosen)])


def _download(asked: Asked) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UsageError(
            f"There is no folder '{asked.name}', and huggingface_hub, which downloads models, is not installed.",
            hint="Run: pip install 'edgevlm[compile]'",
        ) from error
    wanted = [*_WANTED, *(_PICKLES if asked.allow_pickle else ()), *(("*.py",) if asked.trust_remote_code else ())]
    try:
        return Path(huggingface_hub.snapshot_download(asked.name, revision=asked.revision, allow_patterns=wanted))
    except errors.RevisionNotFoundError as error:
        raise UsageError(
            f"'{asked.name}' has no revision '{asked.revision}' on the hub.", hint="Pass a branch, tag or commit."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"There is no model '{asked.name}': no such folder, and none on the hub that you may see.",
            hint=asked.nearest(),
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"There is no folder '{asked.name}', and the hub cannot be reached to look for a model of that name.",
            hint=asked.nearest() or "Check the connection, or pass the path of a checkpoint.",
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise ModelError(
            f"'{asked.name}' could not be downloaded: {str(error).strip().splitlines()[0]}",
            hint="Check the connection and the free disk space, then run the same command again.",
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"'{folder}' has no config.json, so it is not a model in Hugging Face's layout.",
            hint="Pass the folder that save_pretrained wrote, or an ONNX file with a card.",
        )
    config = read_json(path)
    if "pretrained_cfg" in config:
        raise ModelError(
            f"'{folder}' is a timm checkpoint, which edgevlm does not read.",
            hint="Write a function that returns timm.create_model(...), and pass it as package.module:function.",
        )
    if "quantization_config" in config:
        raise ModelError(
            f"'{folder}' is quantized already ({config['quantization_config'].get('quant_method', 'unknown')}).",
            hint="Pass the float checkpoint that it was made from.",
        )
    return config


def _family(config: Mapping[str, Any], asked: Asked, folder: Path) -> tuple[str, str | None, str]:
    """The family, Transformers' auto class where the checkpoint brings its own code, and the architecture."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ModelError(
            f"'{folder / 'config.json'}' has no 'architectures', so nobody knows which class the weights are for.",
            hint='Save the model with save_pretrained, or add the key, such as ["ViTForImageClassification"].',
        )
    architecture = str(architectures[0])
    family = family_of(architecture)
    if family is not None:
        return family, None, architecture
    auto_map = config.get("auto_map") or {}
    if not auto_map:
        raise _unsupported(architecture, asked)
    if not asked.trust_remote_code:
        raise ModelError(
            f"'{asked.name}' brings its own code for '{architecture}' (auto_map), which would have to be run.",
            hint="Read the code, then pass --trust-remote-code if you trust it.",
        )
    auto_class = next((name for name in _AUTO_CLASSES if name in auto_map), None)
    if auto_class is None:
        raise ModelError(
            f"'{asked.name}' brings its own code for {', '.join(auto_map)}, and edgevlm calls none of these.",
            hint=f"Use a checkpoint whose auto_map has one of: {', '.join(_AUTO_CLASSES)}.",
        )
    return _AUTO_CLASSES[auto_class][0], auto_class, architecture


def _unsupported(architecture: str, asked: Asked) -> EdgeVLMError:
    task = _task_of_unsupported(architecture)
    if task in TASKS:
        what = f"is {'an' if task[0] in 'aeiou' else 'a'} {task} model of an architecture that edgevlm does not know"
    else:
        what = f"is for {task}; edgevlm compiles {', '.join(TASKS)}" if task else "is no model that edgevlm knows"
    return ModelError(
        f"'{asked.name}' ({architecture}) {what}.",
        hint="See docs/models.md for the architectures, or export it to ONNX yourself and write a card.",
    )


def _task_of_unsupported(architecture: str) -> str | None:
    """What a class of Transformers is for. Slow to import, so only on the way to an error."""
    from edgevlm.families.loading import quiet

    try:
        with quiet():
            from transformers.models.auto import modeling_auto
    except ImportError:
        return None
    for table, task in _TASKS_ELSEWHERE.items():
        names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}).values()
        if any(architecture in (name if isinstance(name, tuple) else (name,)) for name in names):
            return task
    return None


def _task(asked: Asked, tasks: tuple[str, ...], architecture: str) -> str:
    if asked.task is None:
        return tasks[0]
    if asked.task not in tasks:
        raise UsageError(
            f"'{asked.name}' is a {architecture}, which cannot do {asked.task}.", hint=f"Use --task {tasks[0]}."
        )
    return asked.task


def _labels(asked: Asked, config: Mapping[str, Any], task: str) -> tuple[str, ...]:
    if task in (FEATURES, MASKS):
        if asked.labels:
            raise UsageError(f"Labels were given, and {task} has none.", hint="Leave --labels out.")
        return ()
    if task == ZERO_SHOT:
        return asked.labels
    named = config.get("id2label") or {}
    try:
        by_index = {int(index): str(name) for index, name in named.items()}
    except (ValueError, AttributeError) as error:
        raise ModelError(
            f"'{asked.name}' has an id2label whose keys are not numbers.", hint="Number the labels from 0."
        ) from error
    n_labels = len(by_index) or int(config.get("num_labels", 2))
    if by_index and sorted(by_index) != list(range(n_labels)):
        raise ModelError(
            f"'{asked.name}' has an id2label that does not number its {n_labels} labels from 0 on.",
            hint="Number the labels from 0, without gaps.",
        )
    if asked.labels:
        if len(asked.labels) != n_labels:
            raise UsageError(
                f"{len(asked.labels)} labels were given, and '{asked.name}' has {n_labels} classes.",
                hint="Give one label for each class, in the order of the logits.",
            )
        return asked.labels
    return tuple(by_index[i] for i in range(len(by_index)))


def _text(
    family: Family, checkpoint: Checkpoint, task: str, prompt_template: str | None
) -> tuple[TextProcessing | None, str]:
    facts = family.text(checkpoint) if task == ZERO_SHOT else None
    if facts is None:
        return None, ""
    path = checkpoint.folder / "tokenizer.json"
    if not path.is_file():
        is_slow = (checkpoint.folder / "spiece.model").is_file()  # which Transformers 5 saves, and converts no more
        raise ModelError(
            f"'{checkpoint.folder}' has no tokenizer.json, which {ZERO_SHOT} needs.",
            hint="Copy it from the checkpoint that this one was trained from."
            if is_slow
            else "Write it with AutoTokenizer.from_pretrained(...).save_pretrained(...).",
        )
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"'{path}' is not a tokenizer: {error}.", hint="Download the checkpoint again.") from error
    if facts.same_tokens is not None:
        written, meant = (tokenizer.encode(text).ids for text in facts.same_tokens)
        if written != meant:
            raise ModelError(
                f"'{path}' cuts '{facts.same_tokens[0]}' into other tokens than '{facts.same_tokens[1]}', and what "
                f"{checkpoint.architecture} was trained with {facts.same_because}.",
                hint="Add that to the 'normalizer' in tokenizer.json, or copy the file from the original checkpoint.",
            )
    settings = checkpoint.folder / "tokenizer_config.json"
    pad_token = read_json(settings).get("pad_token") if settings.is_file() else None
    pad_token = pad_token.get("content") if isinstance(pad_token, dict) else pad_token
    pad_id = tokenizer.token_to_id(pad_token) if pad_token else None
    pad_id = pad_id if pad_id is not None else facts.pad_token_id
    if pad_id is None:
        raise ModelError(
            f"'{checkpoint.folder}' does not say which token pads a text.",
            hint="Add 'pad_token' to tokenizer_config.json.",
        )
    text = TextProcessing(
        tokenizer="processing/tokenizer.json",
        input_names=facts.input_names,
        max_length=facts.max_length,
        pad_token_id=pad_id,
    )
    if prompt_template is not None:
        text = msgspec.structs.replace(text, prompt_template=prompt_template)
    return text, str(path.resolve())


def _warnings(
    config: Mapping[str, Any], auto_class: str | None, is_pickle: bool, own: ImageProcessing, image: ImageProcessing
) -> tuple[str, ...]:
    found = []
    if is_pickle:
        found.append("The weights were read from a pickle.")
    if auto_class:
        found.append("The checkpoint's own code was run.")
    elif config.get("auto_map"):
        found.append("The checkpoint brings its own code; Transformers' class of the same name was used instead.")
    if image != own:
        found.append(
            f"Pictures are {image.height}×{image.width}, as asked for, where the model was trained on "
            f"{own.height}×{own.width}: expect another accuracy."
        )
    return tuple(found)
