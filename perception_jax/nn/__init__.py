"""Layers that two or more models use, and taps for their intermediate values."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "adapters": ("AdapterParam", "adapter_linear", "adapter_norm"),
        "attention": (
            "Attention",
            "AttentionMask",
            "AttentionOutput",
            "KvCache",
            "attend",
            "multi_head",
        ),
        "int8": ("quantize_linear",),
        "linear": ("Linear", "PatchEmbed", "check_ids", "lookup"),
        "lora": ("LoraConfig", "add_lora", "linear_layers", "merge_lora", "unmerge_lora"),
        "mlp": ("GatedMlp", "Mlp", "gelu", "gelu_tanh", "quick_gelu"),
        "norms": ("ChannelNorm", "GroupNorm", "LayerNorm", "RmsNorm"),
        "pooling": ("MapHead",),
        "rope": ("Rope", "RopeScaling", "axial", "rotary", "rotary_axes", "rotary_sections"),
        "taps": ("Taps",),
        "text_tower": ("TextConfig", "TextTower"),
        "towers": ("ContrastiveOutput", "TowerOutput", "TwoTowers", "contrast"),
        "transformer": ("Block",),
        "vit": ("VisionTransformer",),
    },
    submodules=("attention", "dropout", "maps", "stack", "taps"),
)
