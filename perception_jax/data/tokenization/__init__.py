"""Tokenizers: texts to ids and back, with the place of every token in the text."""

from perception_jax.data.tokenization.clip import ClipTokenizer
from perception_jax.data.tokenization.files import AddedToken, ForeignVocabularyError
from perception_jax.data.tokenization.protocol import (
    Encoding,
    PaddedTokenizer,
    Tokenizer,
    Tokens,
    check_fits,
)
from perception_jax.data.tokenization.siglip import SiglipTokenizer

__all__ = [
    "AddedToken",
    "ClipTokenizer",
    "Encoding",
    "ForeignVocabularyError",
    "PaddedTokenizer",
    "SiglipTokenizer",
    "Tokenizer",
    "Tokens",
    "check_fits",
]
