"""The embedded package: reads a bundle and answers for a picture, with numpy, pillow, tokenizers and one backend."""
