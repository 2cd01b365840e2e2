"""The compiler: ONNX in, a bundle out."""
