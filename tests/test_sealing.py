"""Workers that finish or extend a store at the same moment do not undo each other, and only what belongs together is sealed."""

import json
from pathlib import Path

import pytest

from store import open_store
from store.errors import DamagedError, MismatchError
from store.files import self_checked, write_json
from store.layout import SEAL, STORE_COMMIT, part_commit
from store.writer import StoreWriter
from tests.test_leases import filled, parts_of, tiny_meta
from tests.test_store import tree


def test_a_store_that_others_finish_meanwhile_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = tiny_meta(8)
    writer, other = (StoreWriter.open_or_create(tmp_path / "store", meta) for _ in range(2))
    parts = parts_of(meta)
    other.write_part(0, parts[0])
    exists = Path.exists

    def slow(path: Path) -> bool:
        found = exists(path)
        if path == tmp_path / "store" / part_commit(1) and not found and not over:
            over.append(path)
            other.write_part(1, parts[1])
            other.seal()
        return found

    over: list[Path] = []
    monkeypatch.setattr(Path, "exists", slow)
    assert writer.missing() == []
    assert over


def test_workers_that_extend_a_store_at_once_do_not_undo_each_other(tmp_path: Path) -> None:
    longer = tiny_meta(12)
    whole = filled(tmp_path / "whole", longer)
    filled(tmp_path / "store", tiny_meta(8))
    quick, slow = (StoreWriter.extend(tmp_path / "store", longer) for _ in range(2))
    assert (quick.missing(), slow.missing()) == ([2], [2])
    quick.write_part(2, parts_of(longer)[2])
    assert quick.seal()
    late = StoreWriter.extend(tmp_path / "store", longer)
    assert (tmp_path / "store" / SEAL).exists(), "a worker that came late has taken the seal off a finished store"
    assert late.seal()
    assert slow.seal()
    assert tree(tmp_path / "store") == whole


def test_a_worker_does_not_seal_a_store_that_was_extended_meanwhile(tmp_path: Path) -> None:
    meta, longer = tiny_meta(8), tiny_meta(12)
    filled(tmp_path / "store", meta)
    slow = StoreWriter.open_or_create(tmp_path / "store", meta)
    quick = StoreWriter.extend(tmp_path / "store", longer)
    with pytest.raises(MismatchError, match="was extended to 12 images by another process meanwhile"):
        slow.seal()
    quick.write_part(2, parts_of(longer)[2])
    assert quick.seal()
    assert tree(tmp_path / "store") == filled(tmp_path / "whole", longer)


def test_a_seal_over_a_commit_of_another_run_is_refused(tmp_path: Path) -> None:
    meta = tiny_meta(4)
    filled(tmp_path / "store", meta)
    commit = tmp_path / "store" / part_commit(0)
    content = json.loads(commit.read_bytes())
    write_json(commit, self_checked({**content, "origin": "0" * 64}))
    (tmp_path / "store" / SEAL).unlink()
    writer = StoreWriter.open_or_create(tmp_path / "store", meta)
    with pytest.raises(DamagedError, match="belongs to another run"):
        writer.seal()
    assert (tmp_path / "store" / STORE_COMMIT).exists()
    with pytest.raises(DamagedError):
        open_store(tmp_path / "store", unfinished=True).read(meta.site_objects[0], 0, "mlp_in")
