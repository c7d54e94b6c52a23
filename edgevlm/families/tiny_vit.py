"""TinyViT as SAM's image encoder: the modules, in Transformers' form. Needs torch and transformers at import.

Papers: TinyViT, arXiv:2207.10666 (MIT); MobileSAM, arXiv:2306.14289 (Apache-2.0). Parameters are called as in timm's
``tiny_vit`` (Apache-2.0), so that its weights fit; prompt encoder, mask decoder and neck are Transformers' own of SAM.

As in MobileSAM the last stage does not halve the picture again: 1024 × 1024 pixels become 64 × 64 places, as SAM's.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Their annotations fit no other configuration than SAM's own.
transformers: Any = importlib.import_module("transformers")
sam: Any = importlib.import_module("transformers.models.sam.modeling_sam")
initialization: Any = importlib.import_module("transformers.initialization")

STRIDE = 16
"""Pixels of the picture for each place of what the encoder gives."""


class TinyVitConfig(transformers.PreTrainedConfig):  # type: ignore[misc]
    """TinyViT-5M with SAM's neck where nothing else is said.

    ``num_pos_feats`` and ``scale`` are of the embedding of places, which SAM keeps beside its encoder's settings.
    """

    model_type = "edgevlm-tiny-vit"
    base_config_key = "vision_config"

    image_size: int = 1024
    num_channels: int = 3
    embed_dims: list[int] | tuple[int, ...] = (64, 128, 160, 320)
    depths: list[int] | tuple[int, ...] = (2, 2, 6, 2)
    num_heads: list[int] | tuple[int, ...] = (2, 4, 5, 10)
    window_sizes: list[int] | tuple[int, ...] = (7, 7, 14, 7)
    mlp_ratio: float = 4.0
    conv_expand_ratio: float = 4.0
    output_channels: int = 256
    num_pos_feats: int = 128
    scale: int | float = 160
    initializer_range: float = 0.02

    @property
    def hidden_size(self) -> int:
        """What SAM's neck is given."""
        return int(self.embed_dims[-1])


class TinyVitSamConfig(transformers.PreTrainedConfig):  # type: ignore[misc]
    model_type = "edgevlm-tiny-vit-sam"
    sub_configs_defaults = {
        "prompt_encoder_config": transformers.SamPromptEncoderConfig,
        "mask_decoder_config": transformers.SamMaskDecoderConfig,
        "vision_config": TinyVitConfig,
    }

    vision_config: Any = None
    prompt_encoder_config: Any = None
    mask_decoder_config: Any = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True


class ConvNorm(nn.Sequential):
    def __init__(self, n_in: int, n_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(n_out)


class PatchEmbed(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(n_in, n_out // 2, 3, 2)
        self.act = nn.GELU()
        self.conv2 = ConvNorm(n_out // 2, n_out, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.act(self.conv1(x)))
        return out


class MBConv(nn.Module):
    def __init__(self, width: int, expand_ratio: float) -> None:
        super().__init__()
        inner = int(width * expand_ratio)
        self.conv1 = ConvNorm(width, inner)
        self.conv2 = ConvNorm(inner, inner, 3, groups=inner)
        self.conv3 = ConvNorm(inner, width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(x + self.conv3(self.act(self.conv2(self.act(self.conv1(x))))))
        return out


class PatchMerging(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(n_in, n_out)
        self.conv2 = ConvNorm(n_out, n_out, 3, stride, groups=n_out)
        self.conv3 = ConvNorm(n_out, n_out)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv3(self.act(self.conv2(self.act(self.conv1(x)))))
        return out


class ConvStage(nn.Module):
    def __init__(self, width: int, depth: int, expand_ratio: float) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(MBConv(width, expand_ratio) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x)
        return out


class Mlp(nn.Module):
    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.act = nn.GELU()
        self.fc2 = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(self.norm(x))))
        return out


class Attention(nn.Module):
    """Among the places of a window, with a learned bias for each distance in rows and columns.

    Shapes: [windows, window ** 2, width], both ways.
    """

    def __init__(self, width: int, n_heads: int, window: int) -> None:
        super().__init__()
        self.n_heads, self.window = n_heads, window
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(n_heads, window**2))

    def forward(self, x: Tensor) -> Tensor:
        n, n_places, width = x.shape
        parts = self.qkv(self.norm(x)).view(n, n_places, self.n_heads, 3, width // self.n_heads)
        query, key, value = parts.permute(3, 0, 2, 1, 4).unbind()
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1) + self.attention_biases[:, self._apart()]
        out: Tensor = self.proj((scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(n, n_places, width))
        return out

    def _apart(self) -> Tensor:
        """Of each pair of places, which of the biases is theirs."""
        places = torch.arange(self.window**2, device=self.attention_biases.device)
        rows, columns = places // self.window, places % self.window
        return (rows[:, None] - rows).abs() * self.window + (columns[:, None] - columns).abs()


class Block(nn.Module):
    """Shapes: [n, height, width, channels], both ways, any height and width."""

    def __init__(self, width: int, n_heads: int, window: int, mlp_ratio: float) -> None:
        super().__init__()
        self.window = window
        self.attn = Attention(width, n_heads, window)
        self.local_conv = ConvNorm(width, width, 3, groups=width)
        self.mlp = Mlp(width, mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(x)
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out: Tensor = x + self.mlp(x)
        return out

    def _attend(self, x: Tensor) -> Tensor:
        """Window by window; what does not fill one is padded with zeros, which take part."""
        n, height, width, channels = x.shape
        size = self.window
        below, beside = -height % size, -width % size
        if below or beside:
            x = functional.pad(x, (0, 0, 0, beside, 0, below))
        rows, columns = (height + below) // size, (width + beside) // size
        windows = x.view(n, rows, size, columns, size, channels).transpose(2, 3)
        windows = self.attn(windows.reshape(n * rows * columns, size * size, channels))
        windows = windows.view(n, rows, columns, size, size, channels).transpose(2, 3)
        whole: Tensor = windows.reshape(n, rows * size, columns * size, channels)
        return whole[:, :height, :width]


class Stage(nn.Module):
    def __init__(self, config: TinyVitConfig, i: int) -> None:
        super().__init__()
        width = config.embed_dims[i]
        is_last = i == len(config.depths) - 1
        self.downsample = PatchMerging(config.embed_dims[i - 1], width, stride=1 if is_last else 2)
        blocks = (
            Block(width, config.num_heads[i], config.window_sizes[i], config.mlp_ratio) for _ in range(config.depths[i])
        )
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(self.downsample(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


class _Initialized(sam.SamPreTrainedModel):  # type: ignore[misc]
    """As timm begins, where Transformers would not."""

    config_class: Any = TinyVitSamConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # What a checkpoint gave is marked and left alone by Transformers' functions, so no other may be used here.
        super()._init_weights(module)
        if isinstance(module, Attention):
            initialization.zeros_(module.attention_biases)
        elif isinstance(module, MBConv):
            initialization.zeros_(module.conv3.bn.weight)
        elif isinstance(module, nn.Conv2d):
            # Smaller ones leave nothing of the picture.
            initialization.kaiming_normal_(module.weight, nonlinearity="relu")


class TinyVitEncoder(_Initialized):
    """Shapes: pixel_values [n, 3, height, width] -> last_hidden_state [n, 256, height / 16, width / 16]."""

    config_class = TinyVitConfig
    main_input_name = "pixel_values"

    def __init__(self, config: TinyVitConfig) -> None:
        super().__init__(config)
        self.patch_embed = PatchEmbed(config.num_channels, config.embed_dims[0])
        first = ConvStage(config.embed_dims[0], config.depths[0], config.conv_expand_ratio)
        self.stages = nn.Sequential(first, *(Stage(config, i) for i in range(1, len(config.depths))))
        self.neck = sam.SamVisionNeck(config)
        self.post_init()

    def features(self, pixel_values: Tensor) -> Tensor:
        """Before the neck."""
        out: Tensor = self.stages(self.patch_embed(pixel_values))
        return out

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        features = self.features(pixel_values)
        return sam.SamVisionEncoderOutput(last_hidden_state=self.neck(features.permute(0, 2, 3, 1)))


class TinyVitSam(sam.SamModel, _Initialized):  # type: ignore[misc]
    """SAM with TinyViT for its image encoder; called as ``SamModel`` is."""

    config_class = TinyVitSamConfig

    def __init__(self, config: TinyVitSamConfig) -> None:
        sam.SamPreTrainedModel.__init__(self, config)
        self.shared_image_embedding = sam.SamPositionalEmbedding(config.vision_config)
        self.vision_encoder = TinyVitEncoder(config.vision_config)
        self.prompt_encoder = sam.SamPromptEncoder(config)
        config.mask_decoder_config._attn_implementation = config._attn_implementation
        self.mask_decoder = sam.SamMaskDecoder(config.mask_decoder_config)
        self.post_init()
