"""The catalogue: one TOML file per model. Holds no weights and no code."""
