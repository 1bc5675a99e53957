"""What puts a mask next to GGUF or ONNX weights."""
