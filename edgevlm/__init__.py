"""edgevlm: a compiler that takes vision and vision-language models to edge hardware."""

__version__ = "0.1.0"
