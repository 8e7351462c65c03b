"""Whatever happens to a file of a store, `verify` names that file, says what it costs, and names no other."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zarr

from store import layout
from store.__main__ import COMMANDS
from store.care.checking import entry_of
from store.care.findings import Costs, Finding, costs_of, spans, summary
from store.care.verify import VerifySettings, run, verify
from store.command import program
from store.errors import DamagedError, ForeignError, UnfinishedError
from store.files import json_bytes, parse_self_checked, self_checked, write_json
from store.format import StreamTokens, array_specs, metadata_files, part_files
from store.opening import read_meta
from store.writer import StoreWriter
from tests.small_store import make_store, weights_content
from tests.test_store import tree

CHUNK = "activations/double.00/img/step.1/mlp_in/c.1.0.0"
EVERYTHING = {
    "store_dtype": "fp8-e4m3", "image_tokens": StreamTokens("sample", 5, 12), "text_tokens": StreamTokens("real+0", 8, 8),
    "weights": True, "d_model": 8, "steps": (1,),
}  # fmt: skip
"""a store with files of all kinds"""
PARTS = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished store; whoever changes it puts it back."""
    return make_store(tmp_path_factory.mktemp("verify") / "store", **EVERYTHING).path


@contextmanager
def damaged(path: Path, changes: dict[str, bytes | None]) -> Iterator[None]:
    """Files with other content, or without any, for a while."""
    before = {name: (path / name).read_bytes() if (path / name).exists() else None for name in changes}
    try:
        put(path, changes)
        yield
    finally:
        put(path, before)


def put(path: Path, files: dict[str, bytes | None]) -> None:
    for name, data in files.items():
        if data is None:
            (path / name).unlink(missing_ok=True)
        else:
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(data)


def flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def truncated(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def found(path: Path | str) -> list[tuple[str, str]]:
    return [(each.kind, each.name) for each in verify(path).findings]


def finding(path: Path, name: str) -> Finding:
    (only,) = verify(path).findings
    assert only.name == name
    return only


def test_a_whole_store_is_whole(store: Path) -> None:
    report = verify(store)
    assert report.ok
    files = tree(store)
    in_commits = set(files) - {layout.SEAL, layout.STORE_COMMIT, *map(layout.part_commit, range(PARTS))}
    assert (report.files, report.bytes) == (len(in_commits), sum(len(files[name]) for name in in_commits))
    assert "store is whole, id sha256-" in report.text()


def vouches(name: str) -> bool:
    """Whether other files are checked by what this one says, so that it is damaged alone."""
    return name.startswith(("commits/", layout.SEAL)) or name == layout.ROOT


def damages(content: dict[str, bytes], draw: random.Random) -> list[dict[str, tuple[str, bytes | None]]]:
    """200 flipped bits, 20 truncations and 20 deletions of random files, ten files at a time: name -> kind, new content."""
    ways: list[tuple[str, Callable[[bytes, random.Random], bytes | None]]]
    ways = [("damaged", flipped)] * 200 + [("damaged", truncated)] * 20 + [("missing", lambda data, draw: None)] * 20
    draw.shuffle(ways)
    batches: list[dict[str, tuple[str, bytes | None]]] = []
    for kind, change in ways:
        name = draw.choice(sorted(content))
        event = {name: (kind, change(content[name], draw))}
        open_ones = [each for each in batches if len(each) < 10 and name not in each and not any(map(vouches, each))]
        if open_ones and not vouches(name):
            open_ones[0].update(event)
        else:
            batches.append(event)
    return batches


def test_verify_reports_exactly_the_files_that_were_flipped_truncated_or_deleted(store: Path) -> None:
    content = tree(store)
    batches = damages(content, random.Random(7))
    assert sum(map(len, batches)) == 240
    assert len({name for batch in batches for name in batch}) > 0.9 * len(content), "most files were hit"
    for batch in batches:
        expected = sorted((kind, name) for name, (kind, _) in batch.items())
        expected = [("unsealed" if each == ("missing", layout.SEAL) else each[0], each[1]) for each in expected]
        with damaged(store, {name: data for name, (_, data) in batch.items()}):
            assert sorted(found(store)) == expected
    assert tree(store) == content


def test_the_costs_of_every_file_name_what_the_metadata_say_of_it(store: Path) -> None:
    meta = read_meta(store)
    specs = {spec.name: spec.attributes for spec in array_specs(meta)}
    for part in range(PARTS):
        images = (meta.part_images(part).start, meta.part_images(part).stop - 1)
        for name in part_files(meta, part):
            costs = costs_of(name, meta, images)
            about = specs.get(name.rpartition("/")[0])
            assert costs.images == images
            if about is not None:
                assert costs.steps == (about["step"],)
                assert costs.sites == (about.get("site", about.get("stream")),)
                assert costs.points == ((about["point"],) if "point" in about else ())
            else:
                assert costs.what in ("prompts", "pictures", "statistics")
    assert {costs_of(name, meta, None).what for name in metadata_files(meta)} == {"root", "card", "metadata"}


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        (CHUNK, "damaged", "(activations) differs from its committed SHA-256; costs images 4-7 at img_0 step 1 mlp_in"),
        (CHUNK, "short", "(activations) has 3 bytes where 164 were committed"),
        (CHUNK, "missing", "(activations) is missing; costs images 4-7 at img_0 step 1 mlp_in"),
        (
            "activations/double.00/txt/step.1/mlp_out_scale/c.2.0", "missing",
            "(the scales of rows) is missing; costs images 8-9 at txt_0 step 1 mlp_out",
        ),
        ("tokens/img/step.1/c.0.0", "missing", "(kept positions) is missing; costs which tokens the rows of images 0-3 are at img step 1"),
        (
            "prompts/part-00002.parquet", "damaged",
            "(the prompts of a part) differs from its committed SHA-256; costs the prompts of images 8-9",
        ),
        ("images/part-00000.parquet", "missing", "(the pictures of a part) is missing; costs the pictures of images 0-3"),
        ("statistics/part-00001.safetensors", "missing", "costs the statistics of images 4-7"),
        ("weights/WEIGHTS", "damaged", "(MLP matrices) differs from its committed SHA-256; costs the MLP matrices of img_0, txt_0"),
        ("README.md", "damaged", "(the dataset card) differs from its committed SHA-256; costs no value"),
        ("zarr.json", "damaged", "differs from its committed SHA-256; costs no value, but the store cannot be opened"),
        ("zarr.json", "missing", "(the store's metadata) is missing"),
        (
            "activations/double.00/img/step.1/mlp_in/zarr.json", "damaged",
            "(Zarr's metadata) differs from its committed SHA-256; costs no value, but plain Zarr readers do not find img_0 step 1 mlp_in",
        ),
        ("activations/double.00/zarr.json", "missing", "costs no value, but plain Zarr readers do not find what lies below it"),
        (
            "commits/part-00001.json", "damaged",
            "(the commit of a part) differs from what the seal names: it was damaged; costs images 4-7 at every site, step and point",
        ),
        ("commits/part-00001.json", "missing", "is missing from a finished store: it was lost, not left to be made; costs images 4-7"),
        ("commits/store.json", "damaged", "(the record of what creation wrote) differs from what the seal names: it was damaged"),
        ("commits/store.json", "missing", "is missing from a finished store: it was lost, not left to be made"),
        ("seal.json", "damaged", "(the seal) does not have the checksum that it carries: it was damaged or edited"),
    ],
)  # fmt: skip
def test_each_kind_of_damage_has_its_sentence(store: Path, name: str, kind: str, sentence: str) -> None:
    name = name.replace("WEIGHTS", next((store / "weights").iterdir()).name)
    data = (store / name).read_bytes()
    changed = {"damaged": flipped(data, random.Random(1)), "short": data[:3], "missing": None}[kind]
    with damaged(store, {name: changed}):
        assert sentence in finding(store, name).text()
        with pytest.raises(DamagedError, match="python -m store repair"):
            run(VerifySettings(str(store)))


def test_a_seal_that_was_lost_is_told_from_an_unfinished_store(store: Path) -> None:
    with damaged(store, {layout.SEAL: None}):
        only = finding(store, layout.SEAL)
        assert (only.kind, only.detail) == ("unsealed", "is missing, though every part is committed")
    with damaged(store, {layout.SEAL: None, layout.part_commit(1): None}):
        (only,) = verify(store).findings
        assert (only.kind, only.text()) == ("unfinished", "part 1 of 3 (images 4-7) not committed yet")


def test_a_commit_of_another_run_is_told_from_a_damaged_one(store: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", seed=5, **EVERYTHING).path
    name = layout.part_commit(1)
    with damaged(store, {name: (other / name).read_bytes()}):
        only = finding(store, name)
        assert only.kind == "other-run"
        assert f"belongs to another run: its origin is {read_meta(other).origin}" in only.text()
        assert read_meta(store).origin in only.text()
    with damaged(store, {layout.SEAL: None, name: (other / name).read_bytes()}):
        assert ("other-run", name) in found(store)
    with damaged(store, {name: (store / layout.part_commit(0)).read_bytes()}):
        assert "is whole, but not the one that the seal names: it was exchanged" in finding(store, name).text()
    with damaged(store, {layout.SEAL: None, name: (store / layout.part_commit(0)).read_bytes()}):
        assert ("damaged", name) in found(store)


def test_what_does_not_belong_to_the_store_is_told_by_its_name(store: Path) -> None:
    strangers = {
        "activations/double.00/img/step.1/mlp_in/c.3.0.0": "unlisted",  # there are three parts
        "activations/double.00/img/step.1/mlp_in/c.01.0.0": "unlisted",
        "commits/part-00003.json": "unlisted",
        "notes.txt": "unlisted",
        "prompts/.part-00001.parquet.1.tmp": "leftover",
    }
    with damaged(store, dict.fromkeys(strangers, b"?")):
        report = verify(store)
        assert {each.name: each.kind for each in report.findings} == strangers
        assert "4 files that no commit lists" in report.text()
        assert "1 temporary file of a killed process" in report.text()
        assert "notes.txt is listed by no commit" in report.text()


def test_a_link_is_followed_only_where_it_stands_for_a_folder_of_the_store(store: Path, tmp_path: Path) -> None:
    (store / "activations").rename(tmp_path / "disk")
    (store / "activations").symlink_to(tmp_path / "disk")
    (store / "loop").symlink_to(store)
    try:
        assert found(store) == [("unlisted", "loop")]
    finally:
        (store / "loop").unlink()
        (store / "activations").unlink()
        (tmp_path / "disk").rename(store / "activations")


def test_an_unfinished_store_says_what_is_missing_and_what_goes_on(tmp_path: Path) -> None:
    made = make_store(tmp_path / "whole", **EVERYTHING).path
    path = tmp_path / "store"
    shutil.copytree(made, path)
    (tmp_path / "store.runs").mkdir()
    (tmp_path / "store.runs/settings.json").write_text("{}")
    for name in (layout.SEAL, layout.part_commit(0), layout.part_commit(2)):
        (path / name).unlink()
    with pytest.raises(
        UnfinishedError, match=f"1 store not finished. go on with it: python -m harvest --resume {path}"
    ):
        run(VerifySettings(str(path)))
    (only,) = verify(path).findings
    assert only.text() == "parts 0, 2 of 3 (images 0-3, 8-9) not committed yet", (
        "and files of these parts are no damage"
    )
    writer = StoreWriter.open_or_create(path, read_meta(path), weights_content)
    (path / "prompts/.part-00000.parquet.1.tmp").touch()
    with writer.claim(0):
        (only,) = verify(path).findings
        assert "part-00000 is being written by process" in only.text()
    assert ("leftover", "prompts/.part-00000.parquet.1.tmp") in found(path)
    (path / layout.STORE_COMMIT).unlink()
    assert [each.detail for each in verify(path).findings if each.kind == "unfinished"] == [
        "its creation, or its extension, did not end"
    ]


def test_damaged_metadata_do_not_hide_other_damage(store: Path) -> None:
    content = tree(store)
    lost = {layout.ROOT: b"{", CHUNK: None, "notes.txt": b"?"}
    with damaged(store, lost):
        assert sorted(found(store)) == [("damaged", layout.ROOT), ("missing", CHUNK), ("unlisted", "notes.txt")]
    with damaged(store, {layout.ROOT: None, layout.STORE_COMMIT: None, layout.SEAL: b"?", CHUNK: None}):
        names = {name for _, name in found(store)}
        assert {layout.STORE_COMMIT, layout.SEAL, layout.ROOT, CHUNK} == names
    with damaged(store, {layout.STORE_COMMIT: b"{}", "README.md": b"?"}):
        assert {name for _, name in found(store)} == {layout.STORE_COMMIT, "README.md"}
    everything = {name: b"\xff" for name in content if name.endswith(".json")}
    with damaged(store, everything):
        report = verify(store)
        assert {layout.STORE_COMMIT, layout.SEAL, layout.ROOT} < {each.name for each in report.findings}
        assert "which files no commit lists cannot be said" in report.text()


@pytest.mark.parametrize(
    "edit",
    [
        {"files": {"../../etc/passwd": {"bytes": 0, "sha256": "0" * 64}}},
        {"files": {"/etc/passwd": {"bytes": 0, "sha256": "0" * 64}}},
        {"files": {CHUNK: {"bytes": -1, "sha256": "0" * 64}}},
        {"files": {CHUNK: 3}},
        {"files": [CHUNK]},
        {"files": {}},
        {"images": [0, 4]},
        {"images": None},
        {"part": 2},
    ],
)
def test_a_commit_that_was_edited_with_its_checksum_is_damaged(store: Path, edit: dict[str, object]) -> None:
    name = layout.part_commit(1)
    content = {**parse_self_checked((store / name).read_bytes(), name), **edit}
    with damaged(store, {layout.SEAL: None, name: json_bytes(self_checked(content))}):
        assert ("damaged", name) in found(store)


def test_a_sample_reads_a_share_but_compares_every_length(store: Path) -> None:
    part, whole = verify(store, sample=0.3, seed=1), verify(store)
    assert 0 < part.unread < whole.files
    assert part.files + part.unread == whole.files
    assert "left out by the sample" in part.text()
    assert verify(store, sample=0.3, seed=1).bytes == part.bytes != verify(store, sample=0.3, seed=2).bytes
    with damaged(store, {CHUNK: b""}):
        assert [each.name for each in verify(store, sample=1e-9).findings] == [CHUNK]
    with damaged(store, {CHUNK: bytes(len((store / CHUNK).read_bytes()))}):
        assert verify(store, sample=1e-9).ok, "of a file that is not in the sample only the length is known"


def test_a_file_that_may_not_be_read_is_not_called_damaged(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(path: Path, *args: object, **kwargs: object) -> object:
        if path == store / CHUNK:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    only = finding(store, CHUNK)
    assert (only.kind, only.detail) == ("unreadable", "cannot be read: Permission denied")


def test_a_folder_in_place_of_a_file_is_damage(store: Path) -> None:
    for name in (CHUNK, layout.SEAL):
        data = (store / name).read_bytes()
        (store / name).unlink()
        (store / name).mkdir()
        try:
            assert "is a folder" in finding(store, name).text()
        finally:
            (store / name).rmdir()
            (store / name).write_bytes(data)


def test_a_remote_store_is_verified_by_name_and_never_listed(store: Path) -> None:
    url = f"local://{store}"
    report = verify(url)
    assert report.ok
    assert "were not looked for: a remote store is never listed" in report.text()
    assert report.files == verify(store).files
    changes = {CHUNK: b"?", "prompts/part-00000.parquet": None, "notes.txt": b"?", layout.part_commit(2): None}
    with damaged(store, changes):
        assert sorted(found(url)) == [
            ("damaged", CHUNK), ("missing", layout.part_commit(2)), ("missing", "prompts/part-00000.parquet"),
        ]  # fmt: skip
        assert "push it again from a whole copy" in verify(url).remedy


def test_what_is_no_store_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(ForeignError, match="there is no store at"):
        verify(tmp_path / "nothing")
    with pytest.raises(ForeignError, match=r"has no zarr\.json"):
        verify(tmp_path)
    zarr.create_group(tmp_path / "plain", zarr_format=3)
    with pytest.raises(ForeignError, match="no attribute 'granary'"):
        verify(tmp_path / "plain")


def test_a_store_of_a_later_format_is_not_called_damaged(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store").path
    root = json.loads((path / layout.ROOT).read_bytes())
    root["attributes"]["granary"]["format_version"] = 2
    data = json_bytes(root)
    record = parse_self_checked((path / layout.STORE_COMMIT).read_bytes(), "")
    record["files"][layout.ROOT] = entry_of(data)
    (path / layout.ROOT).write_bytes(data)
    (path / layout.SEAL).unlink()
    write_json(path / layout.STORE_COMMIT, self_checked(record))
    with pytest.raises(ForeignError, match="format version 2; this Granary reads version 1"):
        verify(path)


def test_the_findings_are_there_for_programs_too(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with damaged(store, {CHUNK: None}):
        assert program("store", COMMANDS, ["verify", str(store), "--json"]) == 1
    said = capsys.readouterr()
    answer = json.loads(said.out)
    assert answer["ok"] is False
    (only,) = answer["findings"]
    assert (only["kind"], only["name"], only["part"]) == ("missing", CHUNK, 1)
    assert only["costs"] == {
        "what": "activations", "images": [4, 7], "sites": ["img_0"], "steps": [1], "points": ["mlp_in"],
    }  # fmt: skip
    assert "error:" in said.err.splitlines()[-1]
    assert program("store", COMMANDS, ["verify", str(store)]) == 0
    assert program("store", COMMANDS, ["verify", str(store), "--sample", "2"]) == 2


def test_the_summary_puts_the_images_of_an_array_together() -> None:
    def lost(first: int, site: str) -> Finding:
        return Finding("damaged", "", 0, "", Costs("activations", (first, first + 3), (site,), (2,), ("mlp_in",)))

    assert summary([lost(8, "img_3"), lost(0, "img_3"), lost(12, "img_3"), lost(4, "txt_3")]) == [
        "4 files damaged: images 0-3, 8-15 at img_3 step 2 mlp_in; images 4-7 at txt_3 step 2 mlp_in"
    ]
    assert spans([(3, 3)]) == "image 3"
    many = summary(lost(0, f"img_{layer}") for layer in range(40))
    assert many[0].endswith("and 28 more")


def test_verify_goes_on_whatever_a_small_file_holds(store: Path) -> None:
    draw = np.random.default_rng(3)
    odd = [b"", b"[]", b'{"sha256": 1}', b'{"a": NaN, "sha256": ""}', b'"\\ud800"', b"[" * 100_000, draw.bytes(500)]
    odd += [b'{"commits": {"store": 3}, "sha256": "x"}']
    for name in (layout.SEAL, layout.STORE_COMMIT, layout.ROOT, layout.part_commit(0)):
        for number, data in enumerate(odd):
            if number % 4 == 0:
                with damaged(store, {name: data}):
                    assert found(store) == [("damaged", name)]
            with damaged(store, {layout.SEAL: None, name: data}):
                assert not verify(store).ok


def test_a_number_of_parts_that_cannot_be_is_damage(store: Path) -> None:
    root = json.loads((store / layout.ROOT).read_bytes())
    root["attributes"]["granary"]["n_images"] = 10**30
    with damaged(store, {layout.SEAL: None, layout.STORE_COMMIT: None, layout.ROOT: json_bytes(root)}):
        assert ("damaged", layout.ROOT) in found(store)


def test_a_store_is_verified_from_inside(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store)
    assert verify(".").ok
    with damaged(store, {layout.SEAL: None, layout.part_commit(1): None}):
        assert [each.kind for each in verify(".").findings] == ["unfinished"]
