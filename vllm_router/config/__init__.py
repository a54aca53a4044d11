"""What servers.toml may say: schema, parsing, validation, diff and reload."""
