"""MOInst (multi-object instructions) and sets like it: images whose objects have captions.

The published files (`DF1024/MOInst`, arXiv 2410.20109) have neither class names nor boxes, and the
paper's recipe could not be confirmed. So everything passes through one canonical form:

- `record`: the canonical record, one image per JSON line, and its class table `classes.json`;
- `source`: such a file as a `data.records.Source` (`data.sources.open_source` finds it too);
- `published`: import of the published JSON, strict about rows that it cannot use;
- `lvis`: a comparable set, "MOInst-R", chosen from LVIS v1 without captions;
- `captions`: the questions for an MLLM, and its answers, filtered, as captions of that set;
- `split`: its test part.

Numbers obtained on MOInst-R are numbers on MOInst-R, never on MOInst.
"""

from perception_jax import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "captions": ("add_captions", "questions"),
        "lvis": ("RebuildConfig", "rebuild"),
        "published": ("Imported", "import_published"),
        "record": ("MoinstClass", "MoinstImage", "MoinstObject", "read_images", "write_images"),
        "source": ("MoinstSource",),
        "split": ("stratified_split",),
    },
)
