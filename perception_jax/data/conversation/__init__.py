"""Conversations: turns to prompt text, ids and label masks, as published systems train on them."""

from perception_jax.data.conversation.labels import (
    IGNORE,
    IMAGE,
    EncodedConversation,
    TextTokenizer,
    encode,
    image_spans,
    pad,
    tokenize,
    tokenize_images,
)
from perception_jax.data.conversation.templates import (
    AUTO,
    IMAGE_TEXT,
    SEPARATOR,
    TEMPLATES,
    Template,
    for_images,
    from_jinja,
    images_first,
    named,
    repeat_images,
)

__all__ = [
    "AUTO",
    "IGNORE",
    "IMAGE",
    "IMAGE_TEXT",
    "SEPARATOR",
    "TEMPLATES",
    "EncodedConversation",
    "Template",
    "TextTokenizer",
    "encode",
    "for_images",
    "from_jinja",
    "image_spans",
    "images_first",
    "named",
    "pad",
    "repeat_images",
    "tokenize",
    "tokenize_images",
]
