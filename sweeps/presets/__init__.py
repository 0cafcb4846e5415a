"""The presets, as TOML."""
