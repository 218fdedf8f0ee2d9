"""Fixtures: the tiny model with a tokenizer, and a text."""

from tests.importance.conftest import model_with_tokenizer, text_file

__all__ = ["model_with_tokenizer", "text_file"]
