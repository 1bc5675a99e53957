"""persona-edge: personas for local language models, as masks over their quantized weights."""

__version__ = "0.1.0"
