"""Text from a language model: answers to prompts, and conversations in a terminal."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "attention": ("PromptAttention", "attention_page", "prompt_attention"),
        "chat": ("Chat", "converse"),
        "model": ("TextModel", "Writing"),
        "prompts": ("Prompt", "read_prompts"),
        "serving": ("Serving", "ServingPlan", "serving_plans"),
    },
)
