"""What puts a mask next to GGUF weights."""
