"""Stores travel to servers and back, whole or in part, and what arrives is what was sent, or nothing is.

The S3 server is moto's, behind a proxy that fails (`tests/object_server.py`).  The hub cannot be had here.  What `hf://` does is
shown with two stand-ins, a folder of this machine under that protocol, and the hub's real client before a server of ours;
how the real hub answers, neither can show.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import store.sharing.push
from store import Site, open_store, remote
from store.__main__ import COMMANDS
from store.command import program
from store.errors import DamagedError, MismatchError, StoreError, UnfinishedError, UnreachableError, UsageError
from store.places import place_of
from tests.object_server import Bucket, fetched, hub_server, moto_buckets, one_in, sent, tree, web
from tests.small_store import SmallStore, make_store

IMG = Site.parse("img_0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    """A store of six images in three parts that no test changes."""
    return make_store(tmp_path_factory.mktemp("made") / "store", n_images=6, chunk_images=2, steps=(0,), weights=True)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    """Another store."""
    return make_store(tmp_path_factory.mktemp("other") / "store", n_images=2, chunk_images=2, steps=(0,), seed=1)


def test_push_and_pull_over_a_server_that_fails_one_request_in_ten_give_the_same_bytes(
    bucket: Bucket, made: SmallStore, tmp_path: Path
) -> None:
    bucket.weather.fault = one_in(10)
    sent(made.path, bucket.url("shelf/store"))
    assert bucket.objects("shelf/store") == tree(made.path)
    fetched(bucket.url("shelf/store"), tmp_path / "back")
    assert tree(tmp_path / "back") == tree(made.path)
    assert set(bucket.weather.faults) == {"500", "503", "cut"}
    assert len(bucket.weather.faults) >= len(bucket.weather.seen) // 10 - 1


def test_a_store_is_read_in_place_with_faults_and_no_folder_is_ever_listed(bucket: Bucket, made: SmallStore) -> None:
    bucket.put("store", made.path)
    bucket.weather.fault = one_in(10)
    found = open_store(bucket.url("store"))
    assert (found.id, found.path) == (made.store.id, bucket.url("store"))
    for key, values in made.values.items():
        np.testing.assert_array_equal(found.read(*key).astype(np.float32), values)
    assert found.prompts().equals(made.store.prompts())
    assert found.weights_file(IMG) == made.store.weights_file(IMG)
    listings = [each for each in bucket.weather.seen if "list" in each[1] or each[1].count("/") < 2]
    assert not listings
    assert bucket.weather.faults


def test_a_part_of_a_store_on_a_server_is_pulled_without_reading_the_rest(
    bucket: Bucket, made: SmallStore, tmp_path: Path
) -> None:
    bucket.put("store", made.path)
    bucket.weather.seen.clear()
    fetched(bucket.url("store"), tmp_path / "far", streams="img", images="2-5")
    fetched(str(made.path), tmp_path / "near", streams="img", images="2-5")
    assert tree(tmp_path / "far") == tree(tmp_path / "near")
    assert not [path for _, path in bucket.weather.seen if "/txt/" in path or "/c.0." in path]


def test_a_server_that_always_fails_is_one_message_and_exit_code_1(
    bucket: Bucket, made: SmallStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.weather.fault = lambda number, request: "503"
    assert program("store", COMMANDS, ["push", str(made.path), bucket.url("store")]) == 1
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "Traceback" not in said
    assert f"{bucket.url('store')}/zarr.json could not be read" in said
    assert "reduce your request rate" in said and f"Asked {remote.ATTEMPTS} times" in said
    assert program("store", COMMANDS, ["pull", bucket.url("store"), str(tmp_path / "back")]) == 1
    assert not (tmp_path / "back").exists()


def test_a_server_error_is_never_taken_for_a_missing_file(bucket: Bucket, made: SmallStore) -> None:
    bucket.put("store", made.path)
    bucket.weather.fault = lambda number, request: "500" if "seal.json" in request[1] else None
    with pytest.raises(UnreachableError, match=r"seal\.json"):
        open_store(bucket.url("store"))


def test_a_bucket_that_does_not_exist_is_said_before_anything_is_sent(bucket: Bucket, made: SmallStore) -> None:
    with pytest.raises(UnreachableError, match="make the bucket or repository first"):
        sent(made.path, "s3://no-such-bucket/store")


def test_an_interrupted_push_looks_unfinished_and_the_second_one_sends_only_the_rest(
    bucket: Bucket, made: SmallStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    weather = bucket.weather
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    weather.fault = lambda number, request: (
        "500" if "commits/part-00001" in request[1] and request[0] == "PUT" else None
    )
    with pytest.raises(UnreachableError):
        sent(made.path, bucket.url("store"))
    before = bucket.objects("store")
    assert "commits/part-00000.json" in before and "seal.json" not in before
    with pytest.raises(UnfinishedError):
        open_store(bucket.url("store"))
    weather.fault = lambda number, request: None
    weather.seen.clear()
    tally = sent(made.path, bucket.url("store"))
    whole = tree(made.path)
    assert bucket.objects("store") == whole
    assert weather.count("PUT") == tally.copied == len(whole.keys() - before.keys())
    assert tally.kept == len(before)


def test_what_is_complete_is_sent_no_second_time(bucket: Bucket, made: SmallStore) -> None:
    bucket.put("store", made.path)
    bucket.weather.seen.clear()
    tally = sent(made.path, bucket.url("store"))
    # the seal alone is put again, on the condition that it is not there
    assert [path for method, path in bucket.weather.seen if method == "PUT"] == [f"/{bucket.name}/store/seal.json"]
    assert (tally.copied, tally.kept) == (0, len(tree(made.path)))


def test_another_store_is_refused_at_the_same_url_naming_both(
    bucket: Bucket, made: SmallStore, other: SmallStore
) -> None:
    bucket.put("store", made.path)
    before = bucket.objects("store")
    with pytest.raises(MismatchError, match=f"{made.store.id}.*{other.store.id}"):
        sent(other.path, bucket.url("store"))
    assert bucket.objects("store") == before


def test_a_seal_is_never_replaced_even_when_another_one_lands_at_the_last_moment(
    bucket: Bucket, made: SmallStore, other: SmallStore
) -> None:
    def meanwhile(number: int, request: tuple[str, str]) -> None:
        if request == ("PUT", f"/{bucket.name}/store/seal.json"):
            moto_buckets()[bucket.name].keys["store/seal.json"] = another

    bucket.put("another", other.path)
    another = moto_buckets()[bucket.name].keys["another/seal.json"]

    bucket.weather.fault = meanwhile
    with pytest.raises(MismatchError, match=r"seal\.json is there already"):
        sent(made.path, bucket.url("store"), verify="sizes")
    assert bucket.objects("store")["seal.json"] == (other.path / "seal.json").read_bytes()


def test_of_two_stores_pushed_to_one_url_at_once_the_second_stops_before_it_overwrites_anything(
    bucket: Bucket, made: SmallStore, other: SmallStore
) -> None:
    def meanwhile(number: int, request: tuple[str, str]) -> None:
        if request == ("PUT", f"/{bucket.name}/store/zarr.json"):
            bucket.put("store", other.path)

    bucket.weather.fault = meanwhile
    with pytest.raises(MismatchError, match=r"zarr\.json is there already"):
        sent(made.path, bucket.url("store"))
    assert bucket.objects("store") == tree(other.path)


def test_a_byte_that_flips_on_the_way_there_is_found_by_reading_back_and_sent_again(
    bucket: Bucket, made: SmallStore
) -> None:
    chunk = "activations/double.00/img/step.0/mlp_in/c.1.0.0"
    hits: list[int] = []

    def once(number: int, request: tuple[str, str]) -> Any:
        if request[0] == "PUT" and request[1].endswith(chunk) and not hits:
            hits.append(number)
            return "flip request"
        return None

    bucket.weather.fault = once
    assert sent(made.path, bucket.url("store")).again == [chunk]
    assert bucket.objects("store") == tree(made.path)


def test_a_target_that_keeps_damaging_data_never_gets_a_seal(bucket: Bucket, made: SmallStore) -> None:
    bucket.weather.fault = lambda n, request: (
        "flip request" if request[0] == "PUT" and "c.1.0.0" in request[1] else None
    )
    with pytest.raises(DamagedError, match="does not read back as it was written, twice"):
        sent(made.path, bucket.url("store"))
    assert "seal.json" not in bucket.objects("store")


def test_an_object_damaged_on_the_server_is_not_pulled(bucket: Bucket, made: SmallStore, tmp_path: Path) -> None:
    bucket.put("store", made.path)
    bucket.damage("store/statistics/part-00001.safetensors")
    with pytest.raises(DamagedError, match=r"statistics/part-00001\.safetensors differs from its committed checksum"):
        fetched(bucket.url("store"), tmp_path / "back")
    with pytest.raises(UnfinishedError):
        open_store(tmp_path / "back")


def test_hf_urls_by_a_local_stand_in(hub: Path, made: SmallStore, tmp_path: Path) -> None:
    sent(made.path, "hf://datasets/owner/name")
    assert tree(hub / "datasets/owner/name") == tree(made.path)
    assert open_store("hf://datasets/owner/name").id == made.store.id
    fetched("hf://datasets/owner/name", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(made.path)


def test_the_hubs_own_client_reads_a_store_without_listing_a_folder(
    made: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server of ours answers as the hub does; its client is the real one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub_server(made.path.parent, "owner/name") as (url, seen):
        monkeypatch.setattr(remote.Hub, "_options", lambda place: {"endpoint": url, "token": False})
        found = open_store("hf://datasets/owner/name/store")
        assert found.id == made.store.id
        np.testing.assert_array_equal(found.read(IMG, 0, "mlp_in"), made.store.read(IMG, 0, "mlp_in"))
        fetched("hf://datasets/owner/name/store", tmp_path / "back")
        assert tree(tmp_path / "back") == tree(made.path)
        place = place_of("hf://datasets/owner/name/store")
        seal = (made.path / "seal.json").read_bytes()
        assert (place.size("seal.json"), place.size("nothing")) == (len(seal), None)
        monkeypatch.setattr(remote, "PIECE", 100)
        assert b"".join(place.pieces("seal.json", len(seal))) == seal
        with pytest.raises(FileNotFoundError):
            place.read("nothing")
    assert not [path for path in seen if "/tree/" in path]


def test_a_store_is_read_and_pulled_over_http_but_not_pushed(
    made: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    with web(made.path.parent) as (url, weather):
        weather.fault = one_in(10)
        found = open_store(f"{url}/store")
        assert found.id == made.store.id
        np.testing.assert_array_equal(found.read(IMG, 0, "mlp_in", 1, 5), made.store.read(IMG, 0, "mlp_in", 1, 5))
        fetched(f"{url}/store", tmp_path / "back")
        assert tree(tmp_path / "back") == tree(made.path)
        assert place_of(f"{url}/store").size("nothing") is None
        assert place_of(f"{url}/store").size("seal.json") == len((made.path / "seal.json").read_bytes())
        weather.fault = lambda number, request: "500"
        with pytest.raises(UnreachableError):
            place_of(f"{url}/store").size("seal.json")  # aiohttp's file system calls every failure a missing file
        with pytest.raises(UsageError, match="nothing can be written there"):
            sent(made.path, f"{url}/new")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_copied(
    made: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(store.sharing.push, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match="1 KB are free"):
        fetched(str(made.path), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_pull_that_was_killed_goes_on_and_leaves_nothing_half_written(made: SmallStore, tmp_path: Path) -> None:
    fetched(str(made.path), tmp_path / "back")
    (tmp_path / "back" / "seal.json").unlink()
    (tmp_path / "back" / "commits" / "part-00002.json").unlink()
    lost = tmp_path / "back" / "activations/double.00/img/step.0/mlp_in/c.2.0.0"
    lost.rename(lost.with_name(f".{lost.name}.0a1b2c3d.tmp"))
    tally = fetched(str(made.path), tmp_path / "back")
    assert tally.copied == 3
    assert tree(tmp_path / "back") == tree(made.path)


def test_a_copy_that_was_damaged_since_is_mended_by_the_same_command(made: SmallStore, tmp_path: Path) -> None:
    fetched(str(made.path), tmp_path / "back")
    chunk = "activations/double.00/img/step.0/mlp_in/c.2.0.0"
    (tmp_path / "back" / chunk).write_bytes(b"damaged")
    assert fetched(str(made.path), tmp_path / "back").again == [chunk]
    assert tree(tmp_path / "back") == tree(made.path)


def test_a_folder_that_holds_something_else_is_refused(made: SmallStore, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="exists and is no store"):
        fetched(str(made.path), tmp_path / "mine")
    with pytest.raises(UsageError, match="lie in one another"):
        sent(made.path, str(made.path / "copy"))
    with pytest.raises(UsageError, match="is no folder"):
        fetched(str(made.path), Path("s3://bucket/store"))
