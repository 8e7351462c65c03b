"""Stores of format version 1, as they were written once, are read by this version, and this version writes the same bytes."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from store import open_store
from store.info import describe
from tests.golden.stores import make
from tests.test_store import tree

GOLDEN = sorted(path.name for path in make.HERE.iterdir() if path.is_dir() and path.name.startswith("v"))
EXPECTED = json.loads(make.EXPECTED.read_bytes())


def test_there_are_golden_stores_of_every_kind() -> None:
    assert list(EXPECTED) == GOLDEN
    metas = [open_store(make.HERE / name).meta for name in GOLDEN if name.startswith("v1-")]
    assert {meta.store_dtype for meta in metas} == {"bfloat16", "float16", "float32", "fp8-e4m3"}
    assert {meta.codec for meta in metas} == {"none", "zstd"}
    assert {meta.targets for meta in metas} == {"stored", "recomputed"}
    assert {meta.pictures for meta in metas} == {"none", "webp", "png"}
    assert {tokens.policy for meta in metas for tokens in meta.tokens.values()} == {"all", "sample", "real+1"}
    assert any((open_store(make.HERE / name).tokens("txt", 1) < 0).any() for name in ("v1-bfloat16",))
    size = sum(len(data) for name, data in tree(make.HERE).items() if name.partition("/")[0] in GOLDEN)
    assert size < make.MOST_BYTES


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_store_says_what_it_said_when_it_was_written(name: str) -> None:
    assert make.reading(open_store(make.HERE / name)) == EXPECTED[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_values_of_a_golden_store_are_those_that_were_computed(name: str) -> None:
    store = open_store(make.HERE / name)
    for (site, step, point), values in make.values_of(store.meta).items():
        found, kept = store.read(site, step, point), store.tokens(site.stream, step) >= 0
        assert np.isnan(found[~kept].astype(np.float32)).all()
        exact = kept.copy()
        exact[-1] = False  # the last image holds what not every dtype does
        np.testing.assert_array_equal(found[exact], values[exact])
        close = 1 / 16 if store.meta.store_dtype == "fp8-e4m3" else 0
        np.testing.assert_allclose(found[kept].astype(np.float32), values[kept].astype(np.float32), rtol=close)
    assert store.prompts().column("prompt").to_pylist() == make.WORDS[: store.n_images]
    picture = store.picture(0)
    assert (picture is None) == (store.meta.pictures == "none")
    assert picture is None or np.abs(np.asarray(picture, int)).max() <= 2  # the first is black
    assert store.id in describe(store)


def test_the_matrices_of_a_golden_store_are_whole() -> None:
    store = open_store(make.HERE / "v1-float32")
    data = store.weights_file(store.sites[0])
    assert data is not None
    found = safetensors.numpy.load(data)
    assert found.keys() == make.weights().keys()
    for name, array in make.weights().items():
        np.testing.assert_array_equal(found[name], array)


def test_what_is_written_today_is_what_was_written_then(tmp_path: Path) -> None:
    """Parquet files aside, whose bytes are those of a pyarrow and a Pillow version, and the hashes of them."""
    make.write(tmp_path)
    for name in GOLDEN:
        now, then = tree(tmp_path / name), tree(make.HERE / name)
        assert now.keys() == then.keys()
        for file in now:
            if file.endswith(".parquet"):
                tables = [pq.read_table(io.BytesIO(found[file])) for found in (now, then)]
                assert tables[0].schema == tables[1].schema
                assert tables[0] == tables[1] or file.startswith("images/"), file
            elif not file.startswith(("commits/part", "seal")):
                assert now[file] == then[file], f"{name}/{file}: the format has changed"
