"""Data: rows to prompts and examples."""
