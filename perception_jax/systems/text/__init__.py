"""Language models: answers to prompts, conversations in a terminal, and training."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "attention": ("PromptAttention", "attention_page", "prompt_attention"),
        "chat": ("Chat", "converse"),
        "model": ("TextModel", "Writing"),
        "perplexity": ("Perplexity",),
        "prompts": ("Prompt", "read_prompts"),
        "serving": ("Serving", "ServingPlan", "serving_plans"),
        "vqa": ("Asker", "ImageAnswer", "ImageQuestion", "read_questions"),
        "task": ("TextTask", "TextTaskConfig"),
    },
)
