"""Training of LLaVA and of Mixture of Features (MoF, arXiv 2401.06209): one or two image towers."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "answers": ("ExactAnswers",),
        "task": ("TRAINS", "MofTask", "MofTaskConfig", "chat_predictions"),
    },
)
