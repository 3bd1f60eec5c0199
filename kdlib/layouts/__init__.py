"""Checkpoints whose parameter names are not those of a transformers class, read and written without remote code."""
