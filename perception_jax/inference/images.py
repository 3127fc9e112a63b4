"""A function of one image on a folder of image files: which images, the run, where results go."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageResult:
    """The result of a program for one image.

    Attributes:
      picture: uint8[height, width, 3].
      facts: JSON values.
      line: for the terminal, behind the image's name.
    """

    picture: np.ndarray
    facts: Mapping[str, Any]
    line: str


@dataclasses.dataclass(frozen=True)
class ImageRun:
    """Images and where the results of each go.

    Attributes:
      source: an image or a folder.
      out: folder for the results.
      images: those that `source` means.
      names: of the results of each.
    """

    source: pathlib.Path
    out: pathlib.Path
    images: tuple[pathlib.Path, ...]
    names: tuple[str, ...]

    @classmethod
    def plan(cls, source: pathlib.Path, out: pathlib.Path) -> ImageRun:
        """Nothing is read yet.

        Raises:
          PerceptionError: no images, or results would lie among them.
        """
        from perception_jax.data.image_paths import find_images, output_names

        images = find_images(source)
        return cls(source, out, tuple(images), tuple(output_names(images, out)))

    def run(self, predict: Callable[[pathlib.Path], ImageResult]) -> int:
        """Runs `predict` on each image and writes `NAME.png` and `NAME.json`.

        An image of a folder that cannot be read is named, skipped and counted.

        Returns:
          0, or 1 if no image of the folder could be used.

        Raises:
          ImageError: a single image cannot be read.
          PerceptionError: results cannot be written.
        """
        import tqdm

        from perception_jax.errors import ImageError

        skipped = 0
        hidden = len(self.images) == 1 or not sys.stderr.isatty()
        pairs = list(zip(self.images, self.names, strict=True))
        for image, name in tqdm.tqdm(pairs, unit="image", dynamic_ncols=True, disable=hidden):
            try:
                result = predict(image)
            except ImageError as error:
                if not self.source.is_dir():
                    raise
                skipped += 1
                tqdm.tqdm.write(f"skipped {error}")
                continue
            _save(result, image, self.out, name)
            tqdm.tqdm.write(f"{image.name}{result.line}")
        used = len(self.images) - skipped
        print(f"{self.out}: pictures and JSON of {used} images, {skipped} skipped")
        return int(used == 0)


def _save(result: ImageResult, image: pathlib.Path, out: pathlib.Path, name: str) -> None:
    """Writes `out/name.png` and `out/name.json`, each whole or not at all."""
    from PIL import Image

    from perception_jax.errors import PerceptionError
    from perception_jax.files import write_whole

    picture = io.BytesIO()
    Image.fromarray(result.picture).save(picture, "PNG")
    text = json.dumps(result.facts, ensure_ascii=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / f"{name}.png", picture.getvalue())
        write_whole(out / f"{name}.json", text + "\n")
    except OSError as error:
        raise PerceptionError(
            f"cannot write the results of {image} to {out}: {error}. Check the folder's "
            "permissions and the free space."
        ) from error
