"""The tiny model with a tokenizer, and text for it."""

from tests.importance.conftest import model_with_tokenizer, text_file

__all__ = ["model_with_tokenizer", "text_file"]
