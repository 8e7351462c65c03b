"""`python -m analyze label`: labels set, listed, taken away, exported and merged by hand; what cannot be is refused."""

import io
import shutil
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from analyze.labels.book import LabelBook
from analyze.labels.command import Books, books_of, run
from analyze.labels.settings import LabelSettings
from store.errors import GranaryError, MismatchError, UsageError
from store.files import json_bytes, write_json
from store.labels import KINDS, LAST_TIME, add_labels, parse_labels, read_labels
from tests.object_server import tree
from tests.test_labels import ENTRY, HEAD, said
from tests.toy_dictionaries import random_dictionary
from train.dictionaries.checkpoint import save_dictionary

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one dictionary of our own, transcoder_img_3, with 24 features."""
    save_dictionary(tmp_path / "dictionaries" / "transcoder_img_3", random_dictionary(), None, [])
    return tmp_path / "dictionaries"


def labelled(folder: Path, feature: str | None = None, text: str | None = None, **more: Any) -> Books:
    return run(LabelSettings(feature, text, dictionaries=folder, **{"author": "ada", **more}), lambda: NOON)


def test_a_label_is_set_listed_replaced_and_removed_by_command(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled(folder)
    assert capsys.readouterr().out == "labels: there are none yet\n"
    labelled(folder, "img_3/12", " red circles ")
    where = folder / "transcoder_img_3" / "labels.json"
    assert capsys.readouterr().out == f"img_3/12 · red circles -> {where}\n"
    labelled(folder, "transcoder_img_3/12", "circles", author="bob")
    assert "img_3/12 · circles (it was 'red circles')" in capsys.readouterr().out
    labelled(folder, "img_3/12")
    shown = "2026-01-31T12:00:00Z  ada: red circles\n2026-01-31T12:00:01Z  bob: circles\nimg_3/12 · circles\n"
    assert capsys.readouterr().out == shown
    labelled(folder, "img_3")
    listed = (
        "transcoder_img_3/12 · circles   (bob, 2026-01-31T12:00:01Z)\nlabels: 1 features of 1 dictionaries have one\n"
    )
    assert capsys.readouterr().out == listed
    books = labelled(folder, "img_3/12", remove=True)
    assert "img_3/12 has no label any more (it was 'circles')" in capsys.readouterr().out
    assert books["transcoder_img_3"].texts() == {} and len(read_labels(where)) == 3


def test_an_author_is_who_git_says_or_the_account(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "git").write_text("#!/bin/sh\necho 'Ada  Lovelace'\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    books = labelled(folder, "img_3/1", "a", author=None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("LOGNAME", "lovelace")
    books = labelled(folder, "img_3/2", "b", author=None)
    assert [label.author for label in books["transcoder_img_3"].labels] == ["Ada Lovelace", "lovelace"]


def test_an_export_is_merged_where_the_same_dictionaries_are(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_dictionary(folder / "sae_img_3", random_dictionary(kind="sae"), None, [])
    shutil.copytree(folder, tmp_path / "other")
    labelled(folder, "sae_img_3/1", "a")
    labelled(folder, "transcoder_img_3/2", "b")
    labelled(folder, export=tmp_path / "all.json")
    labelled(tmp_path / "other", "transcoder_img_3/2", "mine", author="bob")
    capsys.readouterr()
    labelled(tmp_path / "other", merge=tmp_path / "all.json")
    assert capsys.readouterr().out.startswith("labels: 2 of 2 in ")
    found = {name: book.labels for name, book in books_of(tmp_path / "other").items()}
    assert found["sae_img_3"] == [said(1, "a")] and found["transcoder_img_3"] == [said(2, "b"), said(2, "mine", "bob")]
    labelled(folder, export=Path("-"))
    exported = capsys.readouterr().out.encode()
    assert exported == (tmp_path / "all.json").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(exported)))
    labelled(tmp_path / "other", merge=Path("-"))
    assert capsys.readouterr().out.startswith("labels: 0 of 2 in standard input are new")


def test_what_is_merged_is_checked_as_a_whole_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    right = {"dictionary": "img_3", **ENTRY}
    for wrong, message in (
        ({**right, "dictionary": "img_9"}, "there is no dictionary img_9 here; there are transcoder_img_3"),
        ({**right, "feature": 99}, "what is merged names feature 99"),
        ({**right, "time": "noon"}, "label 2: time is 'noon'"),
        ({"dictionary": "img_3", "feature": 1}, "label 2 has no .*: write it again with --export or from the report"),
    ):
        write_json(tmp_path / "all.json", {**HEAD, "labels": [right, wrong]})
        with pytest.raises(GranaryError, match=message):
            labelled(folder, merge=tmp_path / "all.json")
        assert not (folder / "transcoder_img_3" / "labels.json").exists()
    write_json(tmp_path / "one.json", {**HEAD, "labels": [ENTRY]})  # a label file itself: there is one dictionary only
    assert labelled(folder, merge=tmp_path / "one.json")["transcoder_img_3"].texts() == {1: "a"}
    save_dictionary(folder / "sae_img_3", random_dictionary(kind="sae"), None, [])
    with pytest.raises(UsageError, match="does not say which dictionary"):
        labelled(folder, merge=tmp_path / "one.json")
    with pytest.raises(UsageError, match="say which, sae_img_3 or transcoder_img_3"):
        labelled(folder, "img_3/1", "b")


@pytest.mark.parametrize(
    ("words", "more", "message"),
    [
        (("img_3/24", "a"), {}, "has no feature 24: it has 0 to 23"), (("img_9/1", "a"), {}, "no dictionary img_9"),
        (("img_3/" + "1" * 5000, "a"), {}, "^.{,300}$"), (("x" * 5000 + "/1", "a"), {}, "^.{,300}$"),
        (("img_3/1", "\u200b"), {}, "something that can be seen"),
        (("img_3/red", "a"), {}, "names no feature"), (("img_3", "a"), {}, "names no feature"),
        (("img_3/1", " "), {}, "say --remove"), (("img_3/1",), {"remove": True}, "nothing to remove"),
        (("img_3/1", "a\nb"), {}, "one line of text"), (("img_3/1", "a"), {"remove": True}, "leave one out"),
        ((), {"remove": True}, "needs the feature"), ((), {"merge": Path("nothing.json")}, "there is no file nothing.json"),
        (("img_3/1", "a"), {"author": " "}, "--author is empty"), ((), {"merge": Path("a"), "export": Path("b")}, "contradict"),
        (("img_3/1",), {"export": Path("b")}, "leave one out"), ((), {"export": Path()}, "is a folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(
    folder: Path, words: tuple[str, ...], more: dict[str, Any], message: str
) -> None:
    before = tree(folder)
    with pytest.raises(UsageError, match=message):
        labelled(folder, *words, **more)
    assert tree(folder) == before


def test_nothing_is_written_into_the_cache_of_the_hub() -> None:
    with pytest.raises(UsageError, match="lies on the hub"):
        labelled(Path("hf://owner/name"), "img_3/1", "a")


def test_an_export_is_written_over_by_the_next_and_nothing_else_is(folder: Path, tmp_path: Path) -> None:
    labelled(folder, "img_3/1", "a")
    target, own = tmp_path / "all.json", folder / "transcoder_img_3" / "labels.json"
    labelled(folder, export=target)
    labelled(folder, "img_3/2", "b")
    labelled(folder, export=target)
    assert b'"text": "b"' in target.read_bytes()
    shutil.copy(own, tmp_path / "labels.json")
    (tmp_path / "notes.txt").write_text("to mother")
    (tmp_path / "link").symlink_to(folder)
    before = tree(tmp_path)
    for name, message in (
        ("labels.json", "exists and is no such export"), ("notes.txt", "exists and is no such export"),
        ("dictionaries/transcoder_img_3/labels.json", "lies among the dictionaries"),
        ("dictionaries/new.json", "lies among the dictionaries"), ("link/new.json", "lies among the dictionaries"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            labelled(folder, export=tmp_path / name)
    assert tree(tmp_path) == before


def test_a_label_at_the_end_of_time_is_refused_and_not_counted_on_from(folder: Path) -> None:
    with pytest.raises(UsageError, match="before the year 9999"):
        run(LabelSettings("img_3/1", "a", dictionaries=folder, author="ada"), lambda: datetime.max.replace(tzinfo=UTC))
    add_labels(folder / "transcoder_img_3" / "labels.json", [replace(said(1, "a"), time=LAST_TIME)])
    with pytest.raises(UsageError, match="before the year 9999"):
        labelled(folder, "img_3/1", "b")


def test_labels_of_features_that_a_dictionary_has_not_stay_in_the_file_and_are_not_used(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "transcoder_img_3" / "labels.json"
    beyond = [said(feature, "b") for feature in range(24, 31)]
    add_labels(path, [said(1, "a"), *beyond])
    (book,) = labelled(folder, "img_3/2", "red").values()
    assert book.texts() == {1: "a", 2: "red"} == LabelBook.of(path.parent, 24).texts()
    assert read_labels(path) == {said(1, "a"), said(2, "red"), *beyond}
    note = capsys.readouterr().err
    assert str(path) in note and "(24, 25, 26, 27, 28 and 2 more; it has 0 to 23)" in note
    with pytest.raises(MismatchError, match="labels of another dictionary"):
        book.merge([said(24, "b")])


@pytest.mark.parametrize("name", [*KINDS, "format", "version", pytest.param("x" * 10**6, id="other")])
def test_what_is_said_of_a_label_file_is_short_however_long_its_words_are(name: str) -> None:
    entry: dict[str, Any] = dict(ENTRY)
    content = {**HEAD, "labels": [entry]}
    (content if name in HEAD else entry)[name] = "\n" * 10**6
    with pytest.raises(GranaryError) as refused:
        parse_labels(json_bytes(content), "labels.json")
    assert len(str(refused.value)) < 400
