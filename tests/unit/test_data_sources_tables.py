"""Sources of Parquet files and TFDS data sets."""

from __future__ import annotations

import io
import pathlib

import numpy as np
import pytest

from perception_jax.data import images
from perception_jax.data.records import ObjectAnnotation
from perception_jax.data.sources import open_source
from perception_jax.data.sources.parquet import ParquetSource
from perception_jax.data.sources.tfds import FeatureMap, TfdsSource
from perception_jax.errors import DataError
from tests.image_files import assert_sound, png, write

# --- Parquet ------------------------------------------------------------------------------------


def parquet(path: pathlib.Path, columns: dict, **options) -> pathlib.Path:
    pyarrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path, **options)
    return path


def test_parquet(tmp_path):
    hub = [{"bytes": png(grey=k), "path": None} for k in range(5)]
    texts = [f"text {k}" for k in range(5)]
    parquet(tmp_path / "1.parquet", {"image": hub, "caption": texts}, row_group_size=2)
    hub = [{"bytes": png(grey=k), "path": "x"} for k in (5, 6)]
    parquet(tmp_path / "2.parquet", {"image": hub, "caption": [None, "text 6"]})
    source = open_source(tmp_path)
    assert isinstance(source, ParquetSource)
    assert_sound(source, 7)
    order = [6, 0, 3, 4, 2, 5, 1, 0]
    assert [int(images.decode(source[k].image)[0, 0, 0]) for k in order] == order
    assert [source[k].captions for k in (4, 5)] == [("text 4",), ()]
    assert [source[k].id for k in (4, 6)] == ["1.parquet:4", "2.parquet:1"]


def test_parquet_with_other_columns(tmp_path):
    content = {"picture": [png()], "texts": [["one", "two"]], "key": [17]}
    path = parquet(tmp_path / "x.parquet", content)
    source = open_source(path, image_column="picture", caption_column="texts", id_column="key")
    assert (source[0].id, source[0].captions) == ("17", ("one", "two"))
    assert ParquetSource(path, image_column="picture", caption_column=None)[0].captions == ()
    with pytest.raises(DataError, match=r"no column 'pictures'. Did you mean picture"):
        ParquetSource(path, image_column="pictures", caption_column=None)
    for columns, message in (
        ({"image_column": "texts", "caption_column": None}, "texts: expected binary"),
        ({"caption_column": "key"}, "key: expected texts or lists of them, found int64"),
        ({"caption_column": None, "id_column": "texts"}, "texts: expected texts or whole numbers"),
    ):
        with pytest.raises(DataError, match=message):
            ParquetSource(path, **{"image_column": "picture", **columns})


def test_parquet_faults(tmp_path):
    with pytest.raises(DataError, match="found neither"):
        ParquetSource(tmp_path)
    with pytest.raises(DataError, match="not a whole Parquet file"):
        ParquetSource(write(tmp_path / "x.parquet", b"PAR1 and no more"))
    path = parquet(tmp_path / "y.parquet", {"image": [png(), None], "caption": ["a", "b"]})
    with pytest.raises(DataError, match=r"y\.parquet: row 1: image: expected an image's bytes"):
        ParquetSource(path)[1]
    pyarrow = pytest.importorskip("pyarrow")
    bad = pyarrow.array([b"a", b"\xff"]).view(pyarrow.string())
    path = parquet(
        tmp_path / "z.parquet", {"image": [png()] * 2, "caption": bad, "key": ["a", None]}
    )
    with pytest.raises(DataError, match=r"z\.parquet: row 1: caption: expected UTF-8"):
        ParquetSource(path)[1]
    with pytest.raises(DataError, match=r"z\.parquet: row 1: key: expected an id, found none"):
        ParquetSource(path, caption_column=None, id_column="key")[1]


# --- TFDS ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tfds_data(tmp_path_factory):
    """A prepared set without TensorFlow: encoded images, texts, ragged boxes."""
    import tensorflow_datasets as tfds

    features = tfds.features

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = None  # nothing to download; spares TFDS the search for its checksum file

        def _info(self):
            label = features.ClassLabel(names=["red_fox", "owl"])
            objects = {"bbox": features.BBoxFeature(), "label": label}
            parts = {
                "image": features.Image(shape=(None, None, 3), encoding_format="png"),
                "image/name": features.Text(),
                "caption": features.Text(),
                "objects": features.Sequence(objects),
            }
            return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(parts))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for k in range(4):
                box = features.BBox(ymin=0.0, xmin=0.25, ymax=0.5, xmax=1.0)
                yield (
                    k,
                    {
                        "image": io.BytesIO(png(grey=k)),
                        "image/name": f"f{k}",
                        "caption": f"text {k}",
                        "objects": [{"bbox": box, "label": j % 2} for j in range(k)],
                    },
                )

    builder = Tiny(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    prepared = tfds.builder_from_directory(builder.data_dir)
    decoders = {"image": tfds.decode.SkipDecoding()}
    return [prepared.as_data_source(split="train", decoders=d) for d in (decoders, None)]


def test_tfds(tfds_data):
    names = {"captions": "caption", "boxes": "objects/bbox", "labels": "objects/label"}
    for data in tfds_data:  # encoded and decoded images
        source = TfdsSource(data, FeatureMap.of(data, id="image/name", **names))
        assert len(source) == 4
        by_name = {record.id: record for record in source}
        assert sorted(by_name) == ["f0", "f1", "f2", "f3"]
        record = by_name["f2"]
        assert int(images.decode(record.image)[0, 0, 0]) == 2
        assert record.captions == ("text 2",)
        assert record.objects == (
            ObjectAnnotation(
                name="red fox", raw_name="red_fox", box=(2.0, 0.0, 8.0, 3.0), category_id=0
            ),
            ObjectAnnotation(name="owl", box=(2.0, 0.0, 8.0, 3.0), category_id=1),
        )
        assert by_name["f0"].objects == ()
    assert_sound(TfdsSource(tfds_data[0], FeatureMap.of(tfds_data[0], captions="caption")), 4)


def test_tfds_faults(tfds_data):
    data = tfds_data[0]
    with pytest.raises(DataError, match=r"tiny: there is no feature 'captoin'. Did you mean cap"):
        FeatureMap.of(data, captions="captoin")
    with pytest.raises(DataError, match=r"no feature 'objects/box'"):
        FeatureMap.of(data, boxes="objects/box", labels="objects/label")
    with pytest.raises(DataError, match="boxes and labels"):
        FeatureMap.of(data, boxes="objects/bbox")
    with pytest.raises(DataError, match="example 0: objects/label: expected an image"):
        TfdsSource(data, FeatureMap(image="objects/label"))


def test_tfds_damage_is_that_of_one_record(tfds_data):
    class Damaged:
        """The prepared set, with some entries as a damaged array_record file gives them."""

        def __init__(self, *bad):
            self.bad = bad

        def __len__(self):
            return 4

        def __getitem__(self, index):
            if index in self.bad:
                raise RuntimeError("Corrupted Riegeli/records file: chunk header hash mismatch")
            return tfds_data[0][index]

    to_record = FeatureMap.of(tfds_data[0], captions="caption")
    source = TfdsSource(Damaged(0, 2), to_record)
    assert source[1].captions
    for index in (0, 2):
        with pytest.raises(DataError, match=rf"example {index}: cannot be read.*Corrupted"):
            source[index]
    with pytest.raises(DataError, match="example 0: cannot be read"):
        TfdsSource(Damaged(0, 1, 2, 3), to_record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": [0, 2]}, r"example 5: label\[1\]: expected a label below 2, found 2"),
        ({"label": [0, -1]}, r"label\[1\]: expected a label below 2"),
        ({"label": [0]}, "box: expected 1 boxes"),
        ({"box": [[0, 0, 1, 1], [0, 0.5, 1, 0.5]]}, r"example 5: box\[1\]: expected x1 < x2"),
        ({"box": [[0, 0, 1, 1], [0, 0, np.nan, 1]]}, r"box\[1\]: expected a list of 4 finite"),
        ({"box": [[0, 0, 1, 1], [0, 0, 2, 1]]}, r"box\[1\]: .*leaves the image of 8×6"),
        ({"text": b"\xff"}, "example 5: text: expected UTF-8"),
        ({"text": [b"a", 3]}, "example 5: text: expected texts"),
        ({"image": "x"}, "example 5: image: expected an image"),
    ],
)
def test_tfds_examples_that_are_refused(change, message):
    boxes, names = [[0, 0, 1, 1], [0, 0, 0.5, 1]], ("Q", "q")
    sound = {"image": png(), "text": b"a", "box": boxes, "label": [0, 1]}
    to_record = FeatureMap(captions="text", boxes="box", labels="label", label_names=names)
    assert [one.name for one in to_record(sound, 5).objects] == ["Q", "q"]
    with pytest.raises(DataError, match=message):
        to_record(sound | change, 5)
    with pytest.raises(DataError, match="example 5: there is no feature 'text'"):
        to_record({key: value for key, value in sound.items() if key != "text"}, 5)
