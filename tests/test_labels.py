"""Labels: added to and never lost, whoever writes at once; no part of a dictionary; merged wherever two files of them meet."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import store.files
from analyze.inputs import Subject, dictionary_identity
from analyze.labels.book import LabelBook, name_of
from analyze.labels.command import run
from analyze.labels.settings import LabelSettings
from store.errors import DamagedError, ForeignError, GranaryError, UnreachableError, UsageError
from store.files import json_bytes, write_json
from store.labels import Label, add_labels, labels_bytes, labels_file, latest, parse_labels, read_labels
from store.places import Folder, Place
from store.sharing import goods
from store.sites import Site
from tests.object_server import Bucket, fetched, one_in, sent, tree
from tests.small_training import Packs, digests, small_run
from tests.toy_dictionaries import random_dictionary
from train import load_dictionaries, load_dictionary
from train.dictionaries.checkpoint import save_dictionary
from train.dictionaries.published import ExportSettings, ImportSettings, import_file, run_export, run_import

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
labels = st.builds(
    Label,
    st.integers(0, 5),
    st.integers(0, 3).map(lambda s: f"2026-01-31T12:00:0{s}Z"),
    st.sampled_from(["ada", "Bob Ό"]),
    st.sampled_from(["", "red", "rot · α", "👩‍💻"]),
)


def said(feature: int, text: str, author: str = "ada", second: int = 0) -> Label:
    return Label(feature, f"2026-01-31T12:00:{second:02}Z", author, text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one dictionary of our own, transcoder_img_3, with 24 features."""
    save_dictionary(tmp_path / "dictionaries" / "transcoder_img_3", random_dictionary(), None, [])
    return tmp_path / "dictionaries"


@settings(max_examples=30, deadline=None)
@given(st.frozensets(labels), st.frozensets(labels), st.frozensets(labels))
def test_merging_is_a_union_whatever_is_merged_into_what_and_a_file_says_all_of_it(
    a: frozenset[Label], b: frozenset[Label], c: frozenset[Label]
) -> None:
    books = [LabelBook(None, 6, part) for part in (a, b, c)]
    one, other = LabelBook(None, 6), LabelBook(None, 6)
    for book in books:
        one.merge(book)
    for book in (*reversed(books), *books):
        other.merge(book)
    assert one.labels == other.labels == sorted(a | b | c)
    assert parse_labels(labels_bytes(a | b), "here") == a | b
    assert one.texts() == {f: one.text(f) for f in range(6) if one.text(f) is not None}


def test_the_latest_label_of_a_feature_is_shown_and_an_empty_one_takes_it_away() -> None:
    found = [
        said(2, "old", second=1),
        said(2, "new", second=5),
        said(1, "gone"),
        said(1, "", second=9),
        said(0, "a", "b"),
    ]
    assert latest(found) == {0: "a", 2: "new"}


def test_what_is_said_last_is_shown_even_within_a_second_or_after_a_clock_that_is_ahead() -> None:
    book = LabelBook(None)
    for text in ("z", "m", "", "a"):
        book.set(4, text, "ada", NOON)
        assert book.text(4) == (text or None)
    book.merge([replace(said(4, "ahead"), time="2031-01-01T00:00:00Z")])
    book.set(4, "now", "ada", NOON)
    book.set(4, "now", "ada", NOON + timedelta(days=1))  # says nothing new
    assert book.text(4) == "now"
    assert [label.time for label in book.labels][-1] == "2031-01-01T00:00:01Z"
    assert len(book.labels) == 6


def test_a_subject_has_its_labels_where_it_lies_and_they_name_its_features(folder: Path) -> None:
    (dictionary,) = load_dictionaries(folder)
    subject = Subject("img_3", dictionary, dictionary_identity(dictionary))
    assert subject.place == folder / "transcoder_img_3"
    book = LabelBook.of(subject)
    assert name_of(subject, 12, book) == name_of(subject, 12, None) == "img_3/12"
    book.set(12, "red", "ada", NOON)
    book.save()
    again = LabelBook.of(subject)
    assert name_of(subject, 12, again) == "img_3/12 · red"
    assert json.loads((folder / "transcoder_img_3" / "labels.json").read_bytes()) == {
        "format": "granary labels", "version": 1,
        "labels": [{"feature": 12, "text": "red", "author": "ada", "time": "2026-01-31T12:00:00Z"}],
    }  # fmt: skip
    made_here = Subject("img_3", random_dictionary(), "")
    assert LabelBook.of(made_here).texts() == {}
    with pytest.raises(UsageError, match="lies in no folder"):
        LabelBook.of(made_here).save()


def test_what_others_write_meanwhile_stays(folder: Path) -> None:
    place = folder / "transcoder_img_3"
    mine, theirs = LabelBook.of(place), LabelBook.of(place)
    mine.set(1, "mine", "ada", NOON)
    theirs.set(2, "theirs", "bob", NOON)
    mine.save()
    theirs.save()
    assert theirs.texts() == LabelBook.of(place).texts() == {1: "mine", 2: "theirs"}


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    writer = (
        "import sys; from pathlib import Path; from store.labels import Label, add_labels\n"
        "for n in range(20): add_labels(Path(sys.argv[1]), [Label(n, '2026-01-31T12:00:00Z', 'process', 'x')])"
    )
    process = subprocess.Popen([sys.executable, "-c", writer, str(path)])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: add_labels(path, [said(n, "x", f"thread {n % 4}")]), range(40)))
    assert process.wait(60) == 0
    assert len(read_labels(path)) == 60
    assert [file.name for file in tmp_path.iterdir()] == ["labels.json"]


def test_a_disk_that_is_full_leaves_the_old_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "labels.json"
    add_labels(path, [said(1, "a")])

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:9])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(store.files, "_dump", full)
    with pytest.raises(OSError, match="No space"):
        add_labels(path, [said(2, "b")])
    assert read_labels(path) == {said(1, "a")}
    assert [file.name for file in tmp_path.iterdir()] == ["labels.json"]


ENTRY = {"feature": 1, "text": "a", "author": "ada", "time": "2026-01-31T12:00:00Z"}
HEAD = {"format": "granary labels", "version": 1}


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b'{"format": "granary lab', DamagedError, "is not JSON any more"),
        (b"\xff\xfe", DamagedError, "is not JSON any more"),
        (b"[]", ForeignError, "no label file of ours"),
        ({"labels": []}, ForeignError, "no label file of ours"),
        ({**HEAD, "version": 2}, ForeignError, "version 2, this Granary reads 'granary labels' version 1"),
        (HEAD, DamagedError, "holds no list of labels"),
        ({**HEAD, "labels": [ENTRY, {**ENTRY, "rank": 1}]}, DamagedError, "label 2 has 'rank', expected feature, text, author, time only"),
        ({**HEAD, "labels": [{**ENTRY, "feature": "1"}]}, DamagedError, "label 1: feature is '1'"),
        ({**HEAD, "labels": [{**ENTRY, "feature": True}]}, DamagedError, "feature is True"),
        ({**HEAD, "labels": [{**ENTRY, "text": "a\nb"}]}, DamagedError, "one line of text"),
        ({**HEAD, "labels": [{**ENTRY, "text": "a" * 201}]}, DamagedError, "201 characters, expected at most 200"),
        ({**HEAD, "labels": [{**ENTRY, "author": ""}]}, DamagedError, "author is empty"),
        ({**HEAD, "labels": [{**ENTRY, "time": "2026-01-31T12:00:00+01:00"}]}, DamagedError, "expected UTC to the second"),
        ({**HEAD, "labels": [{**ENTRY, "time": "2026-02-31T12:00:00Z"}]}, DamagedError, "expected UTC to the second"),
        ({**HEAD, "labels": [{**ENTRY, "time": "9999-12-31T23:59:59Z"}]}, DamagedError, "a moment before the year 9999"),
        ({**HEAD, "labels": [{**ENTRY, "text": "safe\u202egnihton"}]}, DamagedError, "turn the direction of the text"),
        ({**HEAD, "labels": [{**ENTRY, "author": "a\u2066b"}]}, DamagedError, "turn the direction of the text"),
        ({**HEAD, "labels": [{**ENTRY, "text": "\u200b\u3164"}]}, DamagedError, "something that can be seen"),
        ({**HEAD, "labels": [{**ENTRY, "feature": 2**31}]}, DamagedError, "that a dictionary can have"),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_label_file_is_refused_and_left_as_it_is(
    folder: Path, content: Any, kind: type[GranaryError], message: str
) -> None:
    path = folder / "transcoder_img_3" / "labels.json"
    path.write_bytes(content if isinstance(content, bytes) else json_bytes(content))
    before = path.read_bytes()
    with pytest.raises(kind, match=message) as refused:
        run(LabelSettings("img_3/2", "red", dictionaries=folder, author="ada"))
    assert str(path) in str(refused.value)
    assert path.read_bytes() == before


def test_a_folder_in_the_place_of_a_label_file_is_said_to_be_one(folder: Path, tmp_path: Path) -> None:
    (folder / "transcoder_img_3" / "labels.json").mkdir()
    for work in (
        lambda: LabelBook.of(folder / "transcoder_img_3"),
        lambda: goods.goods_at(Folder(folder), True).read_labels(Folder(folder)),
        lambda: run_export(ExportSettings(folder / "transcoder_img_3", tmp_path / "d.pt")),
    ):
        with pytest.raises(ForeignError, match=r"labels\.json is a folder, .* move it away"):
            work()
    assert not (tmp_path / "d.pt").exists()


def test_adding_labels_says_how_many_are_new(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    assert add_labels(path, [said(1, "a"), said(2, "b")]).new == 2
    assert add_labels(path, [said(2, "b"), said(3, "c")]) == (frozenset({said(1, "a"), said(2, "b"), said(3, "c")}), 1)
    book = LabelBook(path)
    book.merge([said(3, "c"), said(4, "d")])
    assert book.save() == 1


def test_labels_that_lie_where_a_dictionary_is_made_are_said_to_name_its_features(
    packs: Packs, tmp_path: Path, without_pictures: None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = "is there from before, with 1 label: what it says will name the features of the new dictionary"
    places = tmp_path / "out" / "transcoder_img_0", tmp_path / "back" / "transcoder_img_3", tmp_path / "p"
    for place in places:
        add_labels(place / "labels.json", [said(1, "a")])
    small_run(packs, tmp_path / "out", rows=512)
    assert f"{places[0] / 'labels.json'} {note}" in capsys.readouterr().out
    small_run(packs, tmp_path / "out", rows=512)
    run_export(ExportSettings(folder / "transcoder_img_3", tmp_path / "transcoder_img_3.pt"))
    assert note not in capsys.readouterr().out
    for _ in range(2):
        run_import(ImportSettings(tmp_path / "transcoder_img_3.pt", tmp_path / "back"))
    assert capsys.readouterr().out.count(f"{places[1] / 'labels.json'} {note}") == 1


def test_labels_are_no_part_of_a_dictionary(folder: Path, tmp_path: Path) -> None:
    place = folder / "transcoder_img_3"
    before = dictionary_identity(load_dictionary(place)), goods.goods_at(Folder(folder), True).name
    add_labels(place / "labels.json", [said(3, "a")])
    assert (dictionary_identity(load_dictionary(place)), goods.goods_at(Folder(folder), True).name) == before
    assert load_dictionary(place).config == random_dictionary().config


def test_a_labelled_dictionary_is_found_finished_by_the_same_training(
    packs: Packs, tmp_path: Path, without_pictures: None
) -> None:
    small_run(packs, tmp_path / "out", rows=512)
    place = tmp_path / "out" / "transcoder_img_0"
    add_labels(place / "labels.json", [said(3, "a")])
    before = digests(tmp_path / "out")
    small_run(packs, tmp_path / "out", rows=512)
    assert digests(tmp_path / "out") == before
    (place / "config.json").unlink()  # as when it is to be trained again: its labels are not in the way
    small_run(packs, tmp_path / "out", rows=512)
    assert digests(tmp_path / "out") == before


def test_a_published_file_keeps_its_labels_beside_it_and_they_follow_import_and_export(
    folder: Path, tmp_path: Path
) -> None:
    place, file = folder / "transcoder_img_3", tmp_path / "published" / "transcoder_img_3.pt"
    add_labels(place / "labels.json", [said(3, "a")])
    file.parent.mkdir()
    run_export(ExportSettings(place, file))
    beside = tmp_path / "published" / "transcoder_img_3.labels.json"
    assert labels_file(file) == beside and read_labels(beside) == {said(3, "a")}
    assert import_file(file).place == file
    assert [d.name for d in load_dictionaries(file.parent)] == ["transcoder_img_3"]
    run(LabelSettings("img_3/5", "b", dictionaries=file.parent, author="bob"), lambda: NOON)
    add_labels(tmp_path / "back" / "transcoder_img_3" / "labels.json", [said(6, "c")])  # no dictionary yet
    run_import(ImportSettings(file, tmp_path / "back"))
    run_import(ImportSettings(file, tmp_path / "back"))
    expected = {said(3, "a"), said(5, "b", "bob"), said(6, "c")}
    assert read_labels(tmp_path / "back" / "transcoder_img_3" / "labels.json") == expected


def test_labels_on_the_hub_are_fetched_with_their_dictionary(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_export(ExportSettings(folder / "transcoder_img_3", tmp_path / "published" / "transcoder_img_3.pt"))
    for place, name in (
        (folder, "transcoder_img_3/labels.json"),
        (tmp_path / "published", "transcoder_img_3.labels.json"),
    ):
        add_labels(place / name, [said(3, "a")])

        def snapshot_download(_: str, *, revision: str | None, allow_patterns: list[str], place: Path = place) -> str:
            cache = tmp_path / "cache"
            shutil.rmtree(cache, ignore_errors=True)
            for file in tree(place):
                if any(fnmatch(file, pattern) for pattern in allow_patterns):
                    (cache / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(place / file, cache / file)
            return str(cache)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        (found,) = load_dictionaries("hf://owner/name", [Site.parse("img_3")])
        assert found.place is not None and LabelBook.of(found.place).texts() == {3: "a"}


@pytest.fixture(params=["bucket", "hub", "folder"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Callable[[str], bytes]]:
    """A URL to push to, and what reads a file there past every fault."""
    if request.param == "bucket":
        bucket: Bucket = request.getfixturevalue("bucket")
        bucket.weather.fault = one_in(7)
        return bucket.url("d"), lambda name: bucket.objects("d")[name]
    if request.param == "hub":
        hub: Path = request.getfixturevalue("hub")
        return "hf://owner/name/d", lambda name: (hub / "owner/name/d" / name).read_bytes()
    return str(tmp_path / "shelf"), lambda name: (tmp_path / "shelf" / name).read_bytes()


def test_labels_travel_with_push_and_pull_and_are_merged_at_both_ends(
    server: tuple[str, Callable[[str], bytes]], folder: Path, tmp_path: Path
) -> None:
    url, read = server
    name, mine = "transcoder_img_3/labels.json", tmp_path / "mine"
    listed = goods.goods_at(Folder(folder), True).list.source  # without a label
    add_labels(folder / name, [said(1, "a")])
    assert sent(folder, url).labels == 1
    assert parse_labels(read(name), url) == {said(1, "a")}
    assert fetched(url, mine).labels == 1
    add_labels(mine / name, [said(1, "b", "me", 3), said(2, "c")])
    add_labels(folder / name, [said(2, "d", "they", 4)])
    assert sent(mine, url).labels == 2
    assert sent(folder, url).labels == 1  # over what mine sent, which this folder never saw
    everything = {said(1, "a"), said(1, "b", "me", 3), said(2, "c"), said(2, "d", "they", 4)}
    assert parse_labels(read(name), url) == everything
    assert fetched(url, mine).labels == 1
    assert read_labels(mine / name) == everything
    assert read("granary-files.json") == listed  # the same dictionaries, whatever is said of them


def test_labels_that_cannot_be_merged_stop_a_push_before_anything_is_copied(
    bucket: Bucket, folder: Path, tmp_path: Path
) -> None:
    damaged = folder / "transcoder_img_3" / "labels.json"
    damaged.write_text("{")
    with pytest.raises(DamagedError, match=r"labels\.json is not JSON any more"):
        sent(folder, bucket.url("d"))
    assert not bucket.objects("d")
    damaged.unlink()
    sent(folder, bucket.url("d"))
    bucket.put("d/transcoder_img_3", foreign_labels(tmp_path / "foreign"))
    add_labels(damaged, [said(1, "a")])
    before, here = bucket.objects("d"), tree(folder)
    with pytest.raises(ForeignError, match="no label file of ours"):
        sent(folder, bucket.url("d"))
    with pytest.raises(ForeignError, match="no label file of ours"):
        fetched(bucket.url("d"), tmp_path / "back")
    assert bucket.objects("d") == before and tree(folder) == here and not (tmp_path / "back").exists()


def foreign_labels(folder: Path) -> Path:
    write_json(folder / "labels.json", {"labels": {"1": "cat"}})
    return folder


class Shelf(Place):
    """A place in memory, where somebody else may write between a look and a write."""

    local = None

    def __init__(self, others: Iterator[bytes]) -> None:
        self.data: bytes | None = None
        self.others = others

    def read(self, name: str) -> bytes:
        if self.data is None:
            raise FileNotFoundError(name)
        return self.data

    def write(self, name: str, data: bytes, create_only: bool = False) -> None:
        self.data = data
        self.data = next(self.others, data)

    def where(self, name: str) -> str:
        return name

    def size(self, name: str) -> int | None:
        raise NotImplementedError

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        raise NotImplementedError

    def write_pieces(self, name: str, size: int, pieces: Iterator[bytes]) -> None:
        raise NotImplementedError


def test_labels_that_another_push_overwrites_meanwhile_are_written_again() -> None:
    theirs = labels_bytes([said(2, "theirs")])
    shelf = Shelf(iter([theirs]))
    assert goods._add_labels(shelf, "labels.json", frozenset({said(1, "mine")})) == 1
    assert parse_labels(shelf.read(""), "shelf") == {said(1, "mine"), said(2, "theirs")}
    with pytest.raises(UnreachableError, match="again and again"):
        goods._add_labels(Shelf(iter([theirs] * 9)), "labels.json", frozenset({said(1, "mine")}))
