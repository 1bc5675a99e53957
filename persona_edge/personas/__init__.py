"""The calibration sets that ship: contrasts per axis, neutral prompts and texts, personas.toml."""
