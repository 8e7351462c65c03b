"""`store info` and `store verify` on packs: what they are, and every damage by its sentence."""

import json
import shutil
from pathlib import Path

import pytest

from store.__main__ import COMMANDS
from store.command import program
from store.errors import DamagedError, UnfinishedError, UsageError
from store.files import read_self_checked, self_checked, write_json
from store.shards import Pack
from tests.object_server import sent
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
    (path / "unfinished").mkdir()  # as an analysis has one: nothing says that a pack is being made
    for command in ("info", "verify"):
        code, _, err = said(capsys, command, str(path))
        assert code == DamagedError.exit_code and f"{path} is a pack that lost its manifest.json" in err
    (path / "unfinished" / "plan.json").touch()
    code, _, err = said(capsys, "verify", str(path))
    assert code == UnfinishedError.exit_code and "is not finished: run the same python -m store pack again" in err


def test_what_a_push_says_of_a_pack_is_verified_with_it(
    pack: Pack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p"
    sent(pack.path, str(path))
    assert said(capsys, "verify", str(path))[0] == 0
    whole = read_self_checked(path / "granary-files.json")
    name = "img_0/means.safetensors"
    for files, detail in (
        ({**whole["files"], name: {**whole["files"][name], "bytes": 1}}, f"has another length of {name}"),
        ({each: entry for each, entry in whole["files"].items() if each != name}, "does not list the files that"),
        ({**whole["files"], "manifest.json": whole["files"][name]}, "is that of another manifest.json"),
        ({**whole["files"], name: 3}, "does not say length and SHA-256"),
    ):
        write_json(path / "granary-files.json", self_checked({**whole, "files": files}))
        code, out, err = said(capsys, "verify", str(path))
        assert code == 1 and f"damaged  granary-files.json {detail}" in out
        assert f"remove {path}/granary-files.json, by which a pull goes, and push the pack again" in err
    (path / "granary-files.json").write_text("{")
    (path / name).unlink()
    code, out, err = said(capsys, "verify", str(path))
    assert "granary-files.json differs from the checksum that it carries" in out
    assert "take these files from a copy" in err and "; then remove " in err


def test_only_files_that_were_read_are_counted_and_folders_and_links_are_named(
    pack: Pack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(pack.path, tmp_path / "p"))
    instead, cut, gone = (path / f"{site}/means.safetensors" for site in ("img_0", "img_1", "txt_0"))
    for file in (instead, gone):
        file.unlink()
    instead.mkdir()
    cut.write_bytes(cut.read_bytes()[:-1])
    (path / "img_1").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "mine.txt").touch()
    (path / "img_1").symlink_to(tmp_path / "elsewhere")
    (path / "round").symlink_to(path)
    code, out, _ = said(capsys, "verify", str(path), "--json")
    report = json.loads(out)
    assert code == 1 and (report["files"], report["unread"]) == (len(pack.files) - 3, 0)
    assert {(each["kind"], each["name"]): each["detail"] for each in report["findings"]} == {
        ("damaged", "img_0/means.safetensors"): "is a folder",
        ("damaged", "img_1/means.safetensors"): f"has {cut.stat().st_size:,} bytes where {cut.stat().st_size + 1:,} were written",
        ("missing", "txt_0/means.safetensors"): "is missing",
        ("unlisted", "round"): "is a link to a folder, of which manifest.json lists nothing",
        ("unlisted", "img_1/mine.txt"): "is not listed by manifest.json",
    }  # fmt: skip


def test_commands_for_stores_say_that_a_pack_is_one_even_without_its_manifest(
    pack: Pack, pack_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost, pushed = Path(shutil.copytree(pack.path, tmp_path / "lost")), tmp_path / "pushed"
    (lost / "manifest.json").unlink()
    sent(pack.path, str(pushed))
    for path in (pushed / "manifest.json", *pushed.glob("*/shard-*.safetensors")):
        path.unlink()
    for path in (pack.path, lost, pushed):
        for words in (
            ("repair", path),
            ("rm", path, "--parts", "0"),
            ("diff", path, pack_store),
            ("diff", pack_store, path),
        ):
            code, _, err = said(capsys, *map(str, words))
            assert code == UsageError.exit_code and f"{path} is a pack, and {words[0]} is for stores" in err
    (lost / "manifest.json").mkdir()
    code, _, err = said(capsys, "verify", str(lost))
    assert code == DamagedError.exit_code and "manifest.json is a folder" in err
