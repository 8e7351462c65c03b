"""`store info` and `store verify` on packs: what they are, and every damage by its sentence."""

import json
import shutil
from pathlib import Path

import pytest

from store.__main__ import COMMANDS
from store.command import program
from store.errors import DamagedError, UnfinishedError
from store.shards import Pack
from tests.small_packs import make


@pytest.fixture(scope="module")
def pack(pack_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return make(pack_store, tmp_path_factory.mktemp("whole") / "p", seed=3)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = program("store", COMMANDS, words)
    return code, *capsys.readouterr()


def test_info_says_what_a_pack_is(pack: Pack, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "info", str(pack.path))
    assert code == 0
    for words in (pack.id, pack.store_id, "train: ", "seed  3 decides", "mlp_in, mlp_out", "d_model ", "256 MB"):
        assert words in out
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()[-len(pack.sites) :]}
    for site in pack.sites:
        real = [f"{pack.manifest['streams']['txt']['real_rows']:,}"] if site.stream == "txt" else []
        assert lines[str(site)][: 2 + len(real)] == [f"{pack.rows(site):,}", *real, str(len(pack.shards(site)))]


def test_a_whole_pack_is_whole(pack: Pack, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "verify", str(pack.path))
    assert code == 0 and f"{len(pack.files)} files read" in out and f"{pack.path} is whole, id {pack.id}" in out


def test_verify_names_every_damage_of_a_pack(pack: Pack, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(shutil.copytree(pack.path, tmp_path / "p"))
    flipped, cut, gone = (
        path / "img_0/means.safetensors",
        path / "img_0/shard-00000.safetensors",
        path / "txt_0/means.safetensors",
    )
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x7f")
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    (path / "mine.txt").touch()
    (path / "img_0" / ".means.safetensors.0badf00d.tmp").touch()
    code, out, err = said(capsys, "verify", str(path))
    sentences = [line.split(maxsplit=2) for line in out.splitlines()[:5]]
    assert code == 1
    assert {(kind, name) for kind, name, _ in sentences} == {
        ("damaged", "img_0/means.safetensors"), ("damaged", "img_0/shard-00000.safetensors"), ("missing", "txt_0/means.safetensors"),
        ("unlisted", "mine.txt"), ("leftover", "img_0/.means.safetensors.0badf00d.tmp"),
    }  # fmt: skip
    assert (
        "differs from its CRC-32C in manifest.json" in out
        and f"bytes where {cut.stat().st_size + 1:,} were written" in out
    )
    assert "2 files damaged, 1 file missing" in err and f"--seed 3 --shard-mb 256 --out {path}" in err
    code, out, _ = said(capsys, "verify", str(path), "--json", "--sample", "0.000001")
    report = json.loads(out)
    assert code == 1 and report["unread"] and {each["kind"] for each in report["findings"]} >= {"missing", "unlisted"}


def test_a_pack_without_a_whole_manifest_is_told_from_a_store(
    pack: Pack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(pack.path, tmp_path / "p"))
    manifest = path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"seed": 3', b'"seed": 4'))
    for command in ("info", "verify"):
        code, _, err = said(capsys, command, str(path))
        assert code == DamagedError.exit_code
        assert "damaged or edited. Take it from a copy, or remove the pack and make it again" in err
    manifest.unlink()
    (path / "unfinished").mkdir()
    code, _, err = said(capsys, "verify", str(path))
    assert code == UnfinishedError.exit_code and "is not finished: run the same python -m store pack again" in err
