"""The catalogue: one TOML file per model, and the mask packs that ship for some. Holds no weights and no code."""
