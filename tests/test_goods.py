"""Packs, dictionaries, score matrices and analyses travel as stores do, by a list that is written last."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from store.errors import DamagedError, ForeignError, MismatchError, UnfinishedError, UsageError
from store.files import read_self_checked, self_checked, sha256_bytes, write_json
from tests.object_server import Bucket, fetched, one_in, sent, tree
from tests.small_store import make_store


def dictionary(folder: Path, weights: bytes) -> Path:
    """A folder in the form of a trained dictionary."""
    folder.mkdir(parents=True)
    contents = {"weights.safetensors": weights, "metrics.json": b"null\n", "log.jsonl": b""}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files = {name: {"bytes": len(content), "sha256": sha256_bytes(content)} for name, content in contents.items()}
    write_json(folder / "config.json", self_checked({"kind": "transcoder", "files": files}))
    return folder


def pack(folder: Path) -> Path:
    from store.pack import PackSettings
    from store.pack import run as make_pack

    made = make_store(folder / "store", n_images=12, pictures="none", prompts=[f"prompt {i}" for i in range(12)])
    make_pack(PackSettings(store=made.path, out=folder / "pack", memory="200MB"))
    return folder / "pack"


def scores(folder: Path) -> Path:
    """A folder in the form of a score matrix."""
    group = zarr.open_group(folder, mode="w", zarr_format=3)
    group.attrs.update({"format": "granary score matrix", "version": 1})
    group.create_array("scores", data=np.ones((2, 3), np.float32))
    return folder


def analysis(folder: Path) -> Path:
    scores(folder / "img_0" / "step.0")
    write_json(folder / "run.json", {"format": "granary analysis", "version": 1})
    return folder


def dictionaries(folder: Path) -> Path:
    dictionary(folder / "transcoder_img_0", b"one")
    dictionary(folder / "sae_img_1", b"two")
    return folder


@pytest.mark.parametrize(
    ("make", "last"),
    [
        (pack, "manifest.json"), (lambda folder: dictionary(folder, b"weights"), "config.json"),
        (dictionaries, "transcoder_img_0/config.json"), (scores, "zarr.json"), (analysis, "run.json"),
        (lambda folder: scores(folder / "step.0").parent, "step.0/zarr.json"),
    ],
    ids=["pack", "dictionary", "dictionaries", "score matrix", "analysis", "score matrices"],
)  # fmt: skip
def test_everything_that_we_make_travels_by_a_list_that_is_written_last(
    bucket: Bucket, tmp_path: Path, make: Callable[[Path], Path], last: str
) -> None:
    folder = make(tmp_path / "goods")
    bucket.weather.fault = one_in(10)
    sent(folder, bucket.url("goods"))
    objects, whole = bucket.objects("goods"), tree(folder)
    assert objects.keys() - whole.keys() == {"granary-files.json"}
    puts = [path.split("/goods/")[1].split("?")[0] for method, path in bucket.weather.seen if method == "PUT"]
    assert puts[-1] == "granary-files.json" and puts.index(last) > max(
        puts.index(name)
        for name in whole
        if not name.endswith(("config.json", "zarr.json", "manifest.json", "run.json"))
    )
    fetched(bucket.url("goods"), tmp_path / "back")
    assert tree(tmp_path / "back") == whole
    bucket.weather.fault = lambda number, request: None
    tally = fetched(bucket.url("goods"), tmp_path / "back")
    assert (tally.copied, tally.kept) == (0, len(whole))


def test_other_goods_at_the_target_are_refused_and_left_as_they_are(bucket: Bucket, tmp_path: Path) -> None:
    made = make_store(tmp_path / "shelf" / "store", n_images=2, chunk_images=2, steps=(0,))
    one, two = dictionary(tmp_path / "one", b"1"), dictionary(tmp_path / "two", b"2")
    sent(one, bucket.url("d"))
    before = bucket.objects("d")
    with pytest.raises(MismatchError, match=r"holds dictionary sha256-.*this is dictionary sha256-"):
        sent(two, bucket.url("d"))
    with pytest.raises(UsageError, match="holds a store"):
        fetched(bucket.url("d"), made.path)
    with pytest.raises(UsageError, match="holds other files"):
        fetched(bucket.url("d"), made.path.parent)
    fetched(bucket.url("d"), tmp_path / "back")
    (tmp_path / "back" / "config.json").unlink()
    (tmp_path / "back" / "weights.safetensors").write_bytes(b"mine")
    with pytest.raises(MismatchError, match="differs from that of dictionary"):
        fetched(bucket.url("d"), tmp_path / "back")
    bucket.put("store", made.path)
    with pytest.raises(UsageError, match="holds a store"):
        sent(one, bucket.url("store"))
    assert bucket.objects("d") == before


def test_what_is_not_ours_unfinished_or_damaged_is_not_pushed(bucket: Bucket, tmp_path: Path) -> None:
    url = bucket.url("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(ForeignError, match="nothing that travels"):
        sent(tmp_path / "photos", url)
    with pytest.raises(UsageError, match="no folder"):
        sent(tmp_path / "nothing", url)
    with pytest.raises(UsageError, match="nothing of Granary"):
        fetched(url, tmp_path / "back")
    trained = dictionary(tmp_path / "trained", b"weights")
    with pytest.raises(UsageError, match="travels whole"):
        sent(trained, url, layers="0")
    (trained / "weights.safetensors").write_bytes(b"weighty")
    with pytest.raises(DamagedError, match=r"weights\.safetensors differs"):
        sent(trained, url)
    (trained / "config.json").unlink()
    (trained / "resume.safetensors").write_bytes(b"")
    with pytest.raises(UnfinishedError, match="did not finish training"):
        sent(trained, url)
    assert not bucket.objects("x")


def test_a_list_that_names_files_outside_is_refused(tmp_path: Path) -> None:
    sent(dictionary(tmp_path / "one", b"1"), str(tmp_path / "shelf"))
    content = read_self_checked(tmp_path / "shelf" / "granary-files.json")
    content["files"]["../../outside"] = content["files"]["config.json"]
    write_json(tmp_path / "shelf" / "granary-files.json", self_checked(content))
    with pytest.raises(ForeignError):
        fetched(str(tmp_path / "shelf"), tmp_path / "back")


@pytest.mark.parametrize("of_a_push", [True, False])
def test_a_list_that_lists_labels_is_refused(tmp_path: Path, of_a_push: bool) -> None:
    one, shelf = dictionary(tmp_path / "one", b"1"), tmp_path / "shelf"
    sent(one, str(shelf))
    place, name = (shelf, "granary-files.json") if of_a_push else (one, "config.json")
    content = read_self_checked(place / name)
    data = b'{"format": "granary labels", "labels": [], "version": 1}'
    content["files"]["labels.json"] = {"bytes": len(data), "sha256": sha256_bytes(data)}
    (place / "labels.json").write_bytes(data)
    write_json(place / name, self_checked(content))
    with pytest.raises(ForeignError, match=r"lists labels\.json, and labels are on no list"):
        fetched(str(place), tmp_path / "back")
    assert not (tmp_path / "back").exists()
