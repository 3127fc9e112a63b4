"""GiVE: adapters that condition a frozen image encoder on an instruction (arXiv 2410.20109)."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "adapter": ("AdapterConfig", "AgAdapter", "InstructionFeatures"),
        "checkpoint": ("ADAPTERS_FILE", "load_give", "save_give"),
        "encode": ("ConditionedEncoder", "InstructionConfig"),
        "evaluation.benchmark": ("evaluation_of",),
        "evaluation.evaluate": ("Evaluation", "EvaluationConfig"),
        "losses": ("LossConfig", "all_losses", "oid", "oiic", "oitc"),
        "maps": ("ConditionedMaps", "conditioned_maps"),
        "model": ("ConditionedTower", "Give", "GiveConfig", "GiveOutput", "instruct"),
        "plus": ("PlusConfig",),
        "predict": ("Predictor",),
        "prediction": ("GivePrediction",),
        "pretrained": ("SHIPPED", "Encoded", "GiveEncoder", "export_merged"),
        "sampler": ("GroupConfig",),
        "task": ("GiveTask", "GiveTaskConfig"),
        "training_data": ("TrainingData",),
    },
)
