"""The calibration sets that ship: contrasts per axis, neutral prompts and texts, and personas.toml, which names them."""
