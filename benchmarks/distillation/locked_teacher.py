"""Two towers for the study on photographs: ImageNet's MobileNetV2, locked, and a text tower that learns to meet it.

    python -m benchmarks.distillation photographs --assets ../shared/assets

The pictures' features are computed once; what learns are the text tower and both projections, so that each picture is
nearest to the name of its class. Source: LiT, Zero-Shot Transfer with Locked-image text Tuning, arXiv:2111.07991.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from edgevlm.cli.progress import shown_progress
from edgevlm.data.data_set import DataSet
from edgevlm.distillation.pictures import TrainingPictures
from edgevlm.distillation.teacher_outputs import StoredOutputs, compute_outputs, describe_outputs, place_of
from edgevlm.distillation.teachers import TorchTeacher
from edgevlm.families.loading import quiet
from edgevlm.ingest import read_model
from edgevlm.training.memory import keep_memory

SEED = 0
TEMPLATES = ("a photo of a {}.", "{}", "a blurry photo of the {}.", "a close-up photo of a {}.")
TEXT_LENGTH = 24
DIMENSION = 256
BATCH_SIZE = 256
N_STEPS = 400
LEARNING_RATE = 5e-4
_MAX_SCALE = 100.0


def train_locked(folder: Path, image_tower: Path, data: DataSet, *, n_steps: int = N_STEPS, say: Any = print) -> None:
    """Make ``folder``; nothing where it is finished."""
    if folder.is_dir():
        return
    import transformers

    keep_memory()
    tower = TorchTeacher(read_model(str(_without_classes(image_tower, folder.with_name("image-tower")))))
    features = _features(tower, data)
    labels = torch.tensor([sample.label for sample in data.samples])
    tokenizer = _tokenizer(data.class_names)
    torch.manual_seed(SEED)
    vision = transformers.MobileNetV2Config.from_pretrained(image_tower)
    vision.hidden_size = features.shape[1]  # what the projection is fed
    config = transformers.VisionTextDualEncoderConfig(
        vision_config=vision.to_dict(), text_config=_text_config(tokenizer).to_dict(), projection_dim=DIMENSION
    )
    dual_encoder: Any = transformers.VisionTextDualEncoderModel
    module: Any = dual_encoder._from_config(config, attn_implementation="eager")
    module.vision_model.load_state_dict(tower.module.base_model.state_dict())
    learned = [*module.text_model.parameters(), *module.text_projection.parameters(),
               *module.visual_projection.parameters(), module.logit_scale]  # fmt: skip
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=n_steps, pct_start=0.1)
    texts = [_tokens(tokenizer, template, data.class_names) for template in TEMPLATES]
    draws = np.random.default_rng(SEED)
    rows = []
    for step in range(n_steps):
        chosen = draws.integers(len(labels), size=BATCH_SIZE)
        pictures = F.normalize(module.visual_projection(features[chosen]), dim=-1)
        read = module.text_model(input_ids=texts[step % len(texts)]).pooler_output
        names = F.normalize(module.text_projection(read), dim=-1)
        loss = F.cross_entropy(module.logit_scale.exp() * pictures @ names.T, labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            module.logit_scale.clamp_(max=float(np.log(_MAX_SCALE)))
        if (step + 1) % 50 == 0 or step + 1 == n_steps:
            rows.append({"step": step + 1, "loss": round(loss.item(), 4)})
            say(f"teacher: {rows[-1]}")
    module.eval()
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    with quiet():
        module.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.copyfile(image_tower / "preprocessor_config.json", unfinished / "preprocessor_config.json")
    (unfinished / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    unfinished.rename(folder)


def _without_classes(classifier: Path, folder: Path) -> Path:
    """A classifier's image tower as a checkpoint of its own."""
    if not folder.is_dir():
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        with quiet():
            TorchTeacher(read_model(str(classifier))).module.base_model.save_pretrained(unfinished)
        shutil.copyfile(classifier / "preprocessor_config.json", unfinished / "preprocessor_config.json")
        unfinished.rename(folder)
    return folder


def _features(tower: TorchTeacher, data: DataSet) -> torch.Tensor:
    """What the locked tower makes of each picture, computed once: float32 [n, d]."""
    name = "image_embeds"
    pictures = TrainingPictures(data, augmentation="none", seed=SEED, n_variants=1)
    of = describe_outputs(tower, pictures, frozenset({name}))
    with shown_progress() as progress:
        compute_outputs(tower, pictures, of, place_of(of), progress=progress)
    return torch.from_numpy(StoredOutputs(place_of(of), of).rows(range(len(data)))[name])


def _tokenizer(names: Sequence[str]) -> Any:
    """Pieces of the words that classes are called by."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    pad, start, unknown, end = "<pad>", "<start>", "<unknown>", "<end>"
    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [template.replace("{}", name) for template in TEMPLATES for name in names]
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=[pad, start, unknown, end])
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ids)
    fast: Any = transformers.PreTrainedTokenizerFast
    return fast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=pad, unk_token=unknown,
        model_max_length=TEXT_LENGTH,
    )  # fmt: skip


def _tokens(tokenizer: Any, template: str, names: Sequence[str]) -> torch.Tensor:
    texts = [template.replace("{}", name) for name in names]
    found: torch.Tensor = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    return found


def _text_config(tokenizer: Any) -> Any:
    import transformers

    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=TEXT_LENGTH, hidden_size=512, intermediate_size=2048,
        num_hidden_layers=6, num_attention_heads=8, projection_dim=DIMENSION, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
