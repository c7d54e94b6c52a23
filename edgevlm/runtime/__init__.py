"""The embedded package: reads a bundle and answers for a picture. numpy, pillow, tokenizers and one backend; never torch or onnx."""
