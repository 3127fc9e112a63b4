"""Records, transforms and loaders; tokenizers, preprocessing, dataset sources, and scenes."""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "geometry": ("Geometry",),
        "grouping": ("Division", "GroupedPlanner"),
        "image_chats": ("ImageChatTransform", "ImageChats"),
        "images": ("decode", "read_size"),
        "image_paths": ("find_images",),
        "loader": ("RecordExamples", "RecordTransform", "make_eval_loader", "make_loader"),
        "packing": ("PackedCounts", "PackedTexts", "TextTransform", "pack"),
        "planned": ("BatchPlan", "BatchTransform", "PlannedData", "Planner", "Row", "RowTransform"),
        "processors": ("ImageProcessor", "ProcessedImage"),
        "records": (
            "Box",
            "Image",
            "MinimalPair",
            "ObjectAnnotation",
            "ObjectInstruction",
            "Question",
            "Record",
            "ReferringExpression",
            "Source",
            "Turn",
        ),
        "sources": ("open_source",),
        "transforms": ("Augment", "ImageTextTransform"),
    },
    submodules=("conversation", "moinst", "scenes", "sources", "tokenization"),
)
