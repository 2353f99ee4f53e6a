"""Heads that travel: DeepSpec, speculators, SpecForge and GGUF, read and written.

Each format is one file that turns its config and names into a `Portable` head and back. What a format cannot hold, or
what a file holds that dspark cannot run, is refused by name."""
