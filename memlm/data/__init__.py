"""Data: corpora, tokenizers and token streams."""
