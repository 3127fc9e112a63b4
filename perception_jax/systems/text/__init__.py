"""Language models alone: what it takes to serve them."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__, {"serving": ("Serving", "ServingPlan", "serving_plans")}
)
