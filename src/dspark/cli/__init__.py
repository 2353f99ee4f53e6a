"""The `dspark` command: one file a verb; each parses, calls one function, and prints."""
