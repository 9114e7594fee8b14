import pickle

import numpy as np
import pytest

from tests.data.pictures import jpeg
from vssd_jax.data import cached
from vssd_jax.data.classification_transforms import resize_shorter_side
from vssd_jax.data.decode import DecodedSource, decode
from vssd_jax.errors import UserError

RECORDS = [{"image": jpeg(i, 20 + i, 30), "label": i} for i in range(7)]
RECORDS[3] = {"image": b"broken", "label": 3}


class Untouchable:
    """A source whose pictures must not be read."""

    def __len__(self):
        return len(RECORDS)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_holds_the_decoded_pictures(tmp_path, monkeypatch, num_workers):
    if num_workers == 0:
        monkeypatch.setattr(cached, "SHARD_LENGTH", 3)  # three files
    folder = tmp_path / "deep" / "cache"
    source = DecodedSource(RECORDS)
    cached.CachedSource(source, folder, shorter_side=22, num_workers=num_workers)
    assert [p.name for p in folder.parent.iterdir()] == ["cache"]
    cache = cached.CachedSource(Untouchable(), folder, shorter_side=22)
    cache = pickle.loads(pickle.dumps(cache))
    assert len(cache) == 7
    for i in (6, *range(7)):
        picture = decode(RECORDS[4 if i == 3 else i]["image"])
        if min(picture.shape[:2]) > 22:
            picture = resize_shorter_side(picture, 22)
            assert min(picture.shape[:2]) == 22
        np.testing.assert_array_equal(cache[i]["image"], picture)
        assert int(cache[i]["label"]) == (4 if i == 3 else i)
        assert int(cache[i]["replaced"]) == (i == 3)
        assert cache[i]["image"].flags.writeable
    # 16 bytes a picture at most beside the pixels: the map itself is not pickled.
    assert len(pickle.dumps(cache)) < 3000


def test_an_interrupted_write_leaves_nothing(tmp_path):
    source = DecodedSource([*RECORDS[:3], *[{"image": b"", "label": 0}] * 200])
    with pytest.raises(UserError, match="100 pictures in a row"):
        cached.CachedSource(source, tmp_path / "cache", shorter_side=22)
    assert list(tmp_path.iterdir()) == []


def test_another_cache_is_refused(tmp_path):
    source = DecodedSource(RECORDS)
    cached.CachedSource(source, tmp_path / "cache", shorter_side=22)
    with pytest.raises(UserError, match="shorter_side 22 not 30"):
        cached.CachedSource(source, tmp_path / "cache", shorter_side=30)
    with pytest.raises(UserError, match="length 7 not 2"):
        cached.CachedSource(DecodedSource(RECORDS[:2]), tmp_path / "cache", shorter_side=22)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="holds no complete cache"):
        cached.CachedSource(source, tmp_path / "other", shorter_side=22)


def test_losing_the_race_to_write_is_no_error(tmp_path):
    folder = tmp_path / "cache"

    class Slow(DecodedSource):
        def __getitem__(self, index):
            if not folder.exists():
                cached.CachedSource(DecodedSource(RECORDS), folder, shorter_side=22)
            return super().__getitem__(index)

    cache = cached.CachedSource(Slow(RECORDS), folder, shorter_side=22)
    assert len(cache) == 7
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
