"""Tokenizers: texts to ids and back, with the place of every token in the text."""

from perception_jax.data.tokenization.byte_level import byte_tokenizer, learned_tokenizer
from perception_jax.data.tokenization.clip import ClipTokenizer
from perception_jax.data.tokenization.decoding import TextStream
from perception_jax.data.tokenization.files import AddedToken, ForeignVocabularyError
from perception_jax.data.tokenization.gguf import from_gguf
from perception_jax.data.tokenization.language import (
    MODES,
    LanguageTokenizer,
    read_tokenizer,
)
from perception_jax.data.tokenization.protocol import (
    Encoding,
    PaddedTokenizer,
    Tokenizer,
    Tokens,
    check_fits,
)
from perception_jax.data.tokenization.siglip import SiglipTokenizer

__all__ = [
    "MODES",
    "AddedToken",
    "ClipTokenizer",
    "Encoding",
    "ForeignVocabularyError",
    "LanguageTokenizer",
    "PaddedTokenizer",
    "SiglipTokenizer",
    "TextStream",
    "Tokenizer",
    "Tokens",
    "byte_tokenizer",
    "check_fits",
    "from_gguf",
    "learned_tokenizer",
    "read_tokenizer",
]
