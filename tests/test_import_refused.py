"""What cannot be imported is refused in a sentence, before anything is written."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from store.command import program
from store.errors import UsageError
from store.foreign.importing import ImportSettings, run
from tests.foreign_files import COMMAND, imported, normal, saved


def fortran(folder: Path) -> Path:
    return saved(folder / "f.npy", np.asfortranarray(normal(2, 4, 8)))


def objects(folder: Path) -> Path:
    np.save(folder / "o.npy", np.array([[["x", None]]], dtype=object), allow_pickle=True)
    return folder / "o.npy"


def cut(folder: Path, suffix: str) -> Path:
    path = saved(folder / f"cut{suffix}", normal(4, 4, 8))
    path.write_bytes(path.read_bytes()[:-1])
    return path


def several(folder: Path) -> Path:
    safetensors.numpy.save_file({"x": normal(2, 4, 8), "y": normal(2, 4, 8)}, folder / "s.safetensors")
    return folder / "s.safetensors"


def two_shapes(folder: Path) -> Path:
    saved(folder / "d" / "1.npy", normal(4, 8))
    return saved(folder / "d" / "2.npy", normal(5, 8)).parent


def two_kinds(folder: Path) -> Path:
    saved(folder / "d" / "1.npy", normal(4, 8))
    return saved(folder / "d" / "2.safetensors", normal(4, 8)).parent


def holding(folder: Path, name: str, content: bytes) -> Path:
    (folder / "d").mkdir()
    (folder / "d" / name).write_bytes(content)
    return folder / "d" / name


REFUSED: dict[str, tuple[Callable[[Path], Path], list[str], str]] = {
    "two axes": (lambda f: saved(f / "a.npy", normal(6, 8)), [], "--rows-per-image STEPSxTOKENS"),
    "four axes": (lambda f: saved(f / "a.npy", normal(2, 2, 2, 8)), [], "float32 2x2x2x8 where (image, token, d_model)"),
    "no axis": (lambda f: saved(f / "a.npy", np.float32(1)), [], "float32 a single number where"),
    "no image": (lambda f: saved(f / "a.npy", normal(0, 4, 8)), [], "there is nothing in it"),
    "rows that do not divide": (
        lambda f: saved(f / "a.npy", normal(10, 8)), ["--rows-per-image", "2x3"], "no whole number of images of 2 x 3 rows",
    ),
    "rows of nothing": (lambda f: saved(f / "a.npy", normal(6, 8)), ["--rows-per-image", "2by3"], "write STEPSxTOKENS"),
    "whole numbers": (lambda f: saved(f / "a.npy", np.zeros((2, 4, 8), np.int32)), [], "holds int32"),
    "integers by key": (
        lambda f: saved(f / "a.safetensors", np.zeros((2, 4, 8), np.int32)), [], "activations is no array of float32",
    ),
    "Fortran order": (fortran, [], "in Fortran order"),
    "pickled objects": (objects, [], "pickles are never opened"),
    "a cut npy": (lambda f: cut(f, ".npy"), [], "was truncated, or is still being written"),
    "a cut safetensors": (lambda f: cut(f, ".safetensors"), [], "was truncated, or is still being written"),
    "no npy at all": (lambda f: holding(f, "a.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': 'hello"), [], "is no .npy file"),
    "no safetensors at all": (lambda f: holding(f, "a.safetensors", b"hello"), [], "is no safetensors file"),
    "a broken header": (
        lambda f: holding(f, "a.safetensors", (4).to_bytes(8, "little") + b"{{{}"), [], "no safetensors header",
    ),
    "a header of lies": (
        lambda f: holding(
            f, "a.safetensors",
            (68).to_bytes(8, "little") + b'{"activations":{"dtype":"F32","shape":[1,1,9],"data_offsets":[0,4]}}',
        ), [], "4 bytes for float32 1x1x9",
    ),
    "a missing key": (lambda f: saved(f / "a.safetensors", normal(2, 4, 8)), ["--key", "z"], "activations: float32 2x4x8"),
    "a key for npy": (lambda f: saved(f / "a.npy", normal(2, 4, 8)), ["--key", "z"], "leave out --key z"),
    "several arrays": (several, [], "say which with --key. It holds x: float32 2x4x8; y: float32 2x4x8"),
    "a folder of two shapes": (two_shapes, [], "2.npy holds float32 5x8, which does not go with 1.npy"),
    "a folder of two kinds": (two_kinds, [], "holds .npy and .safetensors files"),
    "an empty folder": (lambda f: f, [], "holds no .npy and no .safetensors file"),
    "a folder of torch": (lambda f: holding(f, "a.pt", b"").parent, [], "torch.load('a.pt', weights_only=True"),
    "a file of torch": (lambda f: holding(f, "a.pt", b""), [], "torch.load('a.pt', weights_only=True"),
    "another file": (lambda f: holding(f, "a.npz", b""), [], "unpack it"),
    "no file": (lambda f: f / "nothing.npy", [], "there is no file"),
    "no site": (lambda f: saved(f / "a.npy", normal(2, 4, 8)), ["--site", "image_5"], "'image_5' is no site"),
    "a negative step": (lambda f: saved(f / "a.npy", normal(2, 4, 8)), ["--step", "-1"], "say which, 0-based"),
    "two steps of one": (lambda f: saved(f / "a.npy", normal(2, 4, 8)), ["--step", "0-1"], "the array holds one step"),
    "a step too late": (lambda f: saved(f / "a.npy", normal(2, 4, 8)), ["--step", "4"], "not among 4 sampler steps"),
    "unknown sigmas": (
        lambda f: saved(f / "a.npy", normal(2, 4, 8)), ["--num-inference-steps", "20"], "--sigma schnell or --sigma dev",
    ),
    "too few sigmas": (
        lambda f: saved(f / "a.npy", normal(2, 4, 8)), ["--sigma", "1,.5", "--num-inference-steps", "3"], "2 values for 3",
    ),
    "no sigmas": (lambda f: saved(f / "a.npy", normal(2, 4, 8)), ["--sigma", "1,nan"], "write numbers from 0 to 1"),
    "no grid": (lambda f: saved(f / "a.npy", normal(2, 4, 8)), ["--grid", "2"], "write ROWSxCOLUMNS"),
    "another grid": (lambda f: saved(f / "a.npy", normal(2, 4, 8)), ["--grid", "2x3"], "which is not 6"),
    "too many tokens": (lambda f: saved(f / "a.npy", normal(2, 4, 8)), ["--tokens", "5"], "from 1 to 4"),
    "too many images": (lambda f: saved(f / "a.npy", normal(2, 4, 8)), ["--images", "3"], "the arrays hold 2"),
    "no images": (lambda f: saved(f / "a.npy", normal(2, 4, 8)), ["--images", "0"], "must be at least 1"),
    "no prompts": (lambda f: saved(f / "a.npy", normal(2, 4, 8)), ["--prompts", "nowhere.txt"], "no prompt file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_imported_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    make, flags, words = REFUSED[case]
    named = dict(zip(flags[::2], flags[1::2], strict=True))
    named = {"--site": "img_5", "--step": "0", **named}
    path = make(tmp_path)
    given = ["--activations", str(path), *(word for pair in named.items() for word in pair)]
    assert program("store", COMMAND, ["import", *given, "--out", str(tmp_path / "store")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{a}"], "say where it was taken"),
        (["img_5:0={a}", "img_5:0={b}"], "two arrays are given for mlp_out of img_5 at step 0"),
        (["img_5:0={a}", "img_6:0={c}"], "holds 3 images of 8 channels"),
        (["img_5:0={a}", "img_6:0={d}"], "a stream has one number of tokens"),
        (["img_5:0={a}", "img_5:1:mlp_in={b}"], "2 arrays are missing, the first is mlp_in of img_5 at step 0"),
        (["img_5:0:middle={a}"], "'middle' is no point"),
        (["img5:0={a}"], "'img5' is no site"),
        (["img_5:-2={a}"], "step '-2' of"),
        (["img_5:0={a}", "img_6:0={e}"], "say which dtype the store has"),
    ],
)
def test_arrays_that_do_not_make_a_store_together_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    arrays = {
        "a": normal(2, 4, 8), "b": normal(2, 4, 8), "c": normal(3, 4, 8), "d": normal(2, 5, 8),
        "e": normal(2, 4, 8, dtype=np.float16),
    }  # fmt: skip
    paths = {name: saved(tmp_path / f"{name}.npy", values) for name, values in arrays.items()}
    with pytest.raises(UsageError, match=message):
        run(ImportSettings(activations=tuple(word.format(**paths) for word in words), out=tmp_path / "store"))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "one\n", "holds 1 prompts, and 2 images"),
        ("p.csv", "text\none\ntwo\n", "has no column 'prompt'; it has text"),
        ("p.csv", "prompt\none\n''\n", None),
        ("p.csv", "prompt,text_length\none,1\ntwo,9\n", "text_length is 9, and the arrays hold 4 text tokens"),
        ("p.csv", "prompt,seed\none,x\ntwo,y\n", "the column 'seed' is not int64"),
        ("p.jsonl", '{"prompt": "one"}\n{"prompt": " "}\n', "row 1: the prompt is ''"),
        ("p.jsonl", '{"prompt": "one"\n', "is no prompt file that can be read"),
        ("p.parquet", "no parquet", "is no prompt file that can be read"),
    ],
)
def test_prompt_files_are_read_or_refused(tmp_path: Path, name: str, content: str, message: str | None) -> None:
    (tmp_path / name).write_text(content)
    path = saved(tmp_path / "a.npy", normal(2, 4, 8))
    if message is None:
        assert imported(tmp_path, path, site="txt_5", prompts=tmp_path / name).n_images == 2
    else:
        with pytest.raises(UsageError, match=message):
            imported(tmp_path, path, site="txt_5", prompts=tmp_path / name)
