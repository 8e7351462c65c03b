"""A repaired store is the store that it was, byte by byte: from a copy at once, without one after its lost parts are made again."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from store import layout, open_store
from store.__main__ import COMMANDS
from store.care.repair import Repaired, RepairSettings, run
from store.care.survey import remaking
from store.care.verify import verify
from store.command import program
from store.errors import DamagedError, MismatchError, UsageError
from store.format import part_files
from store.places import place_of
from store.writer import StoreWriter
from tests.small_store import SmallStore, make_store, small_meta, small_part, weights_content
from tests.test_store import tree
from tests.test_verify import CHUNK, EVERYTHING, PARTS, damages, flipped, put, truncated

ROOT = Path(__file__).parent.parent
CHANGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flipped": flipped, "cut": truncated, "deleted": lambda data, draw: None,
}  # fmt: skip
EACH_KIND = (
    layout.SEAL, layout.STORE_COMMIT, layout.ROOT, layout.CARD, layout.part_commit(1), "WEIGHTS",
    "activations/double.00/zarr.json", "activations/double.00/img/step.1/mlp_in/zarr.json", CHUNK,
    "tokens/txt/step.1/c.2.0", "prompts/part-00002.parquet", "images/part-00000.parquet",
    "statistics/part-00000.safetensors",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    """One finished store that nobody changes."""
    return make_store(tmp_path_factory.mktemp("repair") / "store", **EVERYTHING)


@pytest.fixture
def copy(made: SmallStore, tmp_path: Path) -> Path:
    """A copy of it, to be damaged, with the settings of the harvest that made it beside it."""
    (tmp_path / "store.runs").mkdir()
    (tmp_path / "store.runs/settings.json").write_text("{}")
    return Path(shutil.copytree(made.path, tmp_path / "store"))


def repair(path: Path, replica: Path | str | None = None, **options: bool) -> Repaired:
    return run(RepairSettings(str(path), None if replica is None else str(replica), **options))


def make_again(path: Path, made: SmallStore) -> None:
    """What `harvest --resume` does: the missing parts with the values that they had."""
    meta = made.store.meta
    values = {key: array.astype(meta.carrier.logical) for key, array in made.values.items()}
    writer = StoreWriter.open_or_create(path, meta, weights_content)
    for part in writer.missing():
        writer.write_part(part, small_part(meta, part, values, [f"prompt number {i}" for i in range(meta.n_images)]))
    assert writer.seal()


def damage(path: Path, name: str, how: str, seed: int = 0) -> str:
    name = name.replace("WEIGHTS", f"weights/{next((path / 'weights').iterdir()).name}") if name == "WEIGHTS" else name
    put(path, {name: CHANGES[how]((path / name).read_bytes(), random.Random(seed))})
    return name


def test_a_copy_gives_every_damaged_file_back(made: SmallStore, copy: Path) -> None:
    content = tree(made.path)
    for batch in damages(content, random.Random(7)):
        put(copy, {name: data for name, (_, data) in batch.items()})
        done = repair(copy, made.path)
        assert done.id == made.store.id
        assert sorted(done.taken + done.remade) == sorted(batch)
        assert not (done.uncommitted or done.uncreated or done.left)
        assert tree(copy) == content


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", EACH_KIND)
def test_without_a_copy_what_is_lost_is_made_again(made: SmallStore, copy: Path, name: str, how: str) -> None:
    name = damage(copy, name, how)
    done = repair(copy)
    part = next(
        (part for part in range(PARTS) if name in (layout.part_commit(part), *part_files(made.store.meta, part))), None
    )
    assert done.uncommitted == ([] if part is None else [part])
    assert done.uncreated == (name == layout.ROOT or name.startswith("weights/"))
    if part is None and not done.uncreated:
        assert done.remade == [name], "it follows from what is there"
        assert done.id == made.store.id
    else:
        kinds = {each.kind for each in verify(copy).findings}
        assert kinds == {"unfinished"}, "nothing is left that looks like damage"
        make_again(copy, made)
    assert tree(copy) == tree(made.path)


def test_many_damages_without_a_copy(made: SmallStore, copy: Path) -> None:
    draw, content = random.Random(5), tree(made.path)
    for _ in range(6):
        chosen = draw.sample(sorted(content), 8)
        put(copy, {name: draw.choice(list(CHANGES.values()))(content[name], draw) for name in chosen})
        repair(copy)
        assert not {each.kind for each in verify(copy).findings} - {"unfinished"}
        make_again(copy, made)
        assert tree(copy) == content


class Killed(BaseException):
    """What `kill -9` does, as far as a test can: nothing after it happens to files of the store."""


def kill_after(monkeypatch: pytest.MonkeyPatch, path: Path, allowed: int) -> None:
    """Let the process die at the change of a name in the store that follows on `allowed` others."""
    changes = iter(range(allowed))

    def dying(change: Callable[..., None]) -> Callable[..., None]:
        def changed(*names: object, **options: object) -> None:
            if path in Path(str(names[0])).parents and next(changes, None) is None:
                raise Killed
            change(*names, **options)

        return changed

    for name in ("unlink", "replace"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))


@pytest.mark.parametrize("with_copy", [False, True])
def test_a_kill_at_any_moment_of_a_repair_leaves_nothing_that_looks_whole(
    made: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_copy: bool
) -> None:
    content, replica = tree(made.path), made.path if with_copy else None
    weights = f"weights/{next((made.path / 'weights').iterdir()).name}"
    lost = {CHUNK: None, layout.part_commit(2): b"{}", layout.ROOT: b"?", weights: None, "README.md": b"?"}
    (tmp_path / "store.runs").mkdir()
    (tmp_path / "store.runs/settings.json").write_text("{}")
    allowed, ended = 0, False
    while not ended:
        path = Path(shutil.copytree(made.path, tmp_path / "store"))
        put(path, lost)
        with monkeypatch.context() as patch:
            kill_after(patch, path, allowed)
            try:
                repair(path, replica)
                ended = True
            except Killed:
                wrong = [each for each in verify(path).findings if each.kind in ("damaged", "missing", "other-run")]
                assert {each.name for each in wrong} <= set(lost), "nothing that was whole looks damaged"
                assert not verify(path).ok, "and nothing that is not whole looks so"
        done = repair(path, replica)
        assert not done.left
        if not with_copy:
            make_again(path, made)
        assert tree(path) == content
        shutil.rmtree(path)
        allowed += 1 if allowed < 6 else 5
    assert allowed > 5


def test_a_copy_must_be_of_the_same_store(made: SmallStore, copy: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", seed=3, **EVERYTHING)
    damage(copy, CHUNK, "deleted")
    with pytest.raises(MismatchError, match=f"it is store {other.store.id}, and this is store {made.store.id}"):
        repair(copy, other.path)
    (copy / layout.SEAL).unlink()
    with pytest.raises(MismatchError, match=f"its origin is {other.store.origin}, and here it is {made.store.origin}"):
        repair(copy, other.path)
    assert not (copy / CHUNK).exists()


def test_a_copy_that_is_damaged_too_gives_what_it_can_and_costs_nothing(
    made: SmallStore, copy: Path, tmp_path: Path
) -> None:
    replica = Path(shutil.copytree(made.path, tmp_path / "replica"))
    both, here = "prompts/part-00001.parquet", "images/part-00001.parquet"
    damage(replica, both, "flipped")
    damage(replica, layout.part_commit(2), "deleted")
    for name in (both, here, layout.part_commit(2)):
        damage(copy, name, "cut")
    with pytest.raises(DamagedError, match="2 could not be repaired") as error:
        repair(copy, replica)
    assert f"{replica / both} is not what was committed either" in str(error.value)
    assert "commits/part-00002.json" in str(error.value)
    assert {each.name for each in verify(copy).findings} == {both, layout.part_commit(2)}
    assert repair(copy, made.path).id == made.store.id
    assert tree(copy) == tree(made.path)


def test_an_unfinished_store_takes_its_missing_parts_from_a_copy_too(made: SmallStore, copy: Path) -> None:
    for name in (layout.SEAL, layout.part_commit(0), CHUNK, "README.md"):
        (copy / name).unlink()
    for name in part_files(made.store.meta, 0)[::2]:
        (copy / name).unlink()
    assert repair(copy, made.path).id == made.store.id
    assert tree(copy) == tree(made.path)


def test_a_copy_can_lie_anywhere(made: SmallStore, copy: Path) -> None:
    damage(copy, CHUNK, "flipped")
    assert repair(copy, f"local://{made.path}").taken == [CHUNK]
    with pytest.raises(UsageError, match="is not on this machine: repair changes folders only"):
        repair(f"local://{copy}", copy)  # type: ignore[arg-type]


def test_what_killed_processes_left_is_removed_and_what_is_foreign_only_when_asked(
    made: SmallStore, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(copy, {"notes.txt": b"?", "prompts/.part-00001.parquet.1.tmp": b"?"})
    assert repair(copy).removed == ["prompts/.part-00001.parquet.1.tmp"]
    assert "left alone: 1 file that no commit lists (--remove-unlisted removes them)" in capsys.readouterr().out
    assert repair(copy, remove_unlisted=True).removed == ["notes.txt"]
    assert tree(copy) == tree(made.path)
    for name in (layout.SEAL, layout.part_commit(1)):
        (copy / name).unlink()
    assert repair(copy).removed == [layout.part_commit(1)], "files of a part that no process finished"
    assert not any((copy / name).exists() for name in part_files(made.store.meta, 1))
    make_again(copy, made)
    assert tree(copy) == tree(made.path)


def test_a_commit_of_another_run_is_taken_out(made: SmallStore, copy: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", seed=3, **EVERYTHING).path
    shutil.copy(other / layout.part_commit(1), copy / layout.part_commit(1))
    assert repair(copy).uncommitted == [1]
    make_again(copy, made)
    assert tree(copy) == tree(made.path)


def test_a_store_that_is_being_written_is_not_repaired(made: SmallStore, copy: Path) -> None:
    for name in (layout.SEAL, layout.part_commit(1)):
        (copy / name).unlink()
    writer = StoreWriter.open_or_create(copy, made.store.meta, weights_content)
    with writer.claim(1), pytest.raises(MismatchError, match=r"is being written \(part-00001 by process"):
        repair(copy)


def test_the_commands_print_what_they_did_and_what_is_left_to_do(
    made: SmallStore, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> str:
        capsys.readouterr()
        assert program("store", COMMANDS, [*words]) == 0
        return capsys.readouterr().out

    assert "is whole, there was nothing to repair, id sha256-" in said("repair", str(copy))
    damage(copy, CHUNK, "deleted")
    assert program("store", COMMANDS, ["verify", str(copy)]) == 1
    assert f"Remedy: python -m store repair {copy} [--from COPY]" in capsys.readouterr().out
    assert f"taken from {made.path}: {CHUNK}" in said("repair", str(copy), "--from", str(made.path))
    damage(copy, CHUNK, "cut")
    text = said("repair", str(copy))
    assert f"part 1 is un-committed: {CHUNK} (activations) has" in text
    assert "is not finished: part 1 of 3 (images 4-7) not committed yet" in text
    assert text.rstrip().endswith(f"python -m harvest --resume {copy}")
    with pytest.raises(Exception, match="not finished"):
        open_store(copy)


def test_parts_that_are_taken_out_are_made_again(
    made: SmallStore, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sum(map(len, tree(copy).values()))
    assert program("store", COMMANDS, ["rm", str(copy), "--parts", "1-2"]) == 0
    text = capsys.readouterr().out
    assert (
        f"parts 1-2 (images 4-9) taken out, {(before - sum(map(len, tree(copy).values()))) / 1000:.3g} KB freed" in text
    )
    assert f"python -m harvest --resume {copy}" in text
    (only,) = verify(copy).findings
    assert only.text() == "parts 1-2 of 3 (images 4-9) not committed yet"
    make_again(copy, made)
    assert tree(copy) == tree(made.path)


def test_parts_that_cannot_be_made_again_are_not_taken_out(
    made: SmallStore, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program("store", COMMANDS, ["rm", f"local://{copy}", "--parts", "1"]) == 2
    assert "rm changes folders only" in capsys.readouterr().err
    assert program("store", COMMANDS, ["rm", str(copy), "--parts", "3"]) == 2
    assert "there is no part 3" in capsys.readouterr().err
    subset = tmp_path / "subset"
    meta = replace(small_meta(), parent={"store": "sha256-x", "origin": "y", "images": [0, 10], "prompts": True})
    StoreWriter.open_or_create(subset, meta)
    assert program("store", COMMANDS, ["rm", str(subset), "--parts", "0"]) == 2
    assert "is a part of another store (sha256-x), so no harvest can make its parts again" in capsys.readouterr().err
    damage(copy, layout.ROOT, "cut")
    assert program("store", COMMANDS, ["rm", str(copy), "--parts", "0"]) == 1
    assert "First: python -m store repair" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parent", "command"),
    [
        (None, "python -m harvest --resume 'a store'"),
        ({"imported": {}}, "the import that made it, again: python -m store import … --out 'a store'"),
        ({"store": "sha256-x"}, "pull it again from where it was taken: python -m store pull SOURCE 'a store' …"),
    ],
)
def test_what_makes_a_store_again_depends_on_what_made_it(
    parent: dict[str, object] | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a store.runs").mkdir()
    Path("a store.runs/settings.json").write_text("{}")
    assert remaking(replace(small_meta(), parent=parent), place_of("a store")) == command


def test_nobody_is_told_to_resume_a_harvest_whose_settings_are_not_there(made: SmallStore, tmp_path: Path) -> None:
    assert "--from COPY" in remaking(small_meta(), place_of(tmp_path / "copied"))
    assert "store push FOLDER" in remaking(small_meta(), place_of("memory://bucket/store"))
    path = Path(shutil.copytree(made.path, tmp_path / "copied"))
    (path / layout.ROOT).write_text("x")
    before = tree(path)
    with pytest.raises(DamagedError, match="take it from a copy: --from COPY"):
        repair(path)
    assert tree(path) == before, "nothing is removed that nobody could make again"


@pytest.mark.slow
def test_the_real_harvest_makes_again_what_repair_gave_up(tmp_path: Path) -> None:
    def run_module(*words: str) -> None:
        subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=True, capture_output=True)

    path = tmp_path / "store"
    run_module(
        "harvest", "--images", "10", "--layers", "1", "--streams", "txt", "--num-inference-steps", "1", "--threads", "1",
        "--resolution", "8", "--max-sequence-length", "8", "--batch-size", "4", "--weights", "copy", "--out", str(path),
    )  # fmt: skip
    before = tree(path)
    chunk = next(name for name in before if "/c.0." in name)
    weights = next(name for name in before if name.startswith("weights/"))
    for lost in ([chunk, weights], [layout.ROOT], [layout.STORE_COMMIT, layout.SEAL, "README.md"]):
        for name in lost:
            damage(path, name, "flipped")
        run_module("store", "repair", str(path))
        if not verify(path).ok:
            run_module("harvest", "--resume", str(path))
        assert tree(path) == before
