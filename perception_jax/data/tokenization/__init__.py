"""Tokenizers: texts to ids of a fixed length, and back."""

from perception_jax.data.tokenization.clip import ClipTokenizer
from perception_jax.data.tokenization.protocol import Tokens
from perception_jax.data.tokenization.siglip import ForeignVocabularyError, SiglipTokenizer

__all__ = ["ClipTokenizer", "ForeignVocabularyError", "SiglipTokenizer", "Tokens"]
