"""Prompts come from files, datasets and our own captions; what cannot be read is refused in one sentence."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harvest.prompt_files import read_file
from harvest.prompts import load_prompts
from harvest.settings import HarvestSettings
from store.errors import UsageError
from store.split import split_of

OUT = Path("unused")


def loaded(**options: Any) -> list[tuple[str, int]]:
    settings = HarvestSettings(out=OUT, **options)
    found = load_prompts(settings)
    return [(prompt.text, found.seed_of(i, settings.seed)) for i, prompt in enumerate(found.prompts)]


def test_a_text_file_has_one_prompt_a_line_and_seeds_count_up(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("\ufeffa red circle\n\n  ein Kreis, größer \r\n", encoding="utf-8")
    assert loaded(prompts=str(file), seed=5) == [("a red circle", 5), ("ein Kreis, größer", 6)]


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_tables_carry_seeds_and_their_other_columns(tmp_path: Path, form: str) -> None:
    rows = [{"prompt": "one, two", "seed": 7, "artist": "x"}, {"prompt": "three", "seed": None, "artist": "y"}]
    file = tmp_path / f"p.{form}"
    if form == "csv":
        file.write_text('prompt,seed,artist\n"one, two",7,x\nthree,,y\n')
    elif form == "jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    assert loaded(prompts=str(file)) == [("one, two", 7), ("three", 1)]
    assert [dict(prompt.columns) for prompt in read_file(file)] == [{"artist": "x"}, {"artist": "y"}]


def test_what_json_cannot_carry_becomes_missing_or_text_and_lines_end_at_newlines_only(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a\u2028b", "score": NaN, "size": [1, 2]}\n', encoding="utf-8")
    (prompt,) = read_file(file)
    assert (prompt.text, dict(prompt.columns)) == ("a\u2028b", {"score": None, "size": "[1, 2]"})
    assert loaded(prompts=str(file)) == [("a\u2028b", 0)]


def test_a_files_seed_counts_up_over_the_repetitions_of_its_prompt(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("prompt,seed\na,40\n")
    assert [seed for _, seed in loaded(prompts=str(file), seeds_per_prompt=3)] == [40, 41, 42]


def test_image_i_has_prompt_i_divided_by_the_seeds_per_prompt(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a\nb\n")
    assert loaded(prompts=str(file), seeds_per_prompt=2) == [("a", 0), ("a", 1), ("b", 2), ("b", 3)]
    assert loaded(prompts=str(file), images=5, cycle=True) == [("a", 0), ("b", 1), ("a", 2), ("b", 3), ("a", 4)]
    with pytest.raises(UsageError, match=r"5 images .* need 5 prompts, and .* has 2: .*--cycle"):
        loaded(prompts=str(file), images=5)


def test_our_own_captions_are_distinct_and_split_by_their_text() -> None:
    held_out = loaded(images=60, split="val")
    assert len({text for text, _ in held_out}) == 60
    assert {split_of(text) for text, _ in held_out} == {"val"}
    assert held_out[:30] == loaded(images=30, split="val")


def test_a_split_of_a_file_takes_its_prompts_only(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("\n".join(f"prompt {i}" for i in range(200)))
    texts = [text for text, _ in loaded(prompts=str(file), split="val")]
    assert texts == [f"prompt {i}" for i in range(200) if split_of(f"prompt {i}") == "val"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "holds no prompts"),
        ("p.txt", b"\n  \n", "holds no prompts"),
        ("p.txt", b"\x89PNG\r\n\x1a\n\xff\xfe", "is not text in UTF-8"),
        ("p.txt", b"a\0b", "NUL bytes"),
        ("p.csv", b"text\nred\n", "no column 'prompt'; it has text"),
        ("p.csv", b"prompt,seed\nred,soon\n", "the seed is 'soon'"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        ("p.jsonl", b'["a"]\n', "no JSON object"),
        ("p.jsonl", b'{"prompt": 3}\n', "the prompt is 3"),
        ("p.jsonl", b'{"prompt": "a", "seed": -1}\n', "the seed is -1"),
        ("p.jsonl", b'{"prompt": "a", "seed": 1.7}\n', "the seed is 1.7"),
        ("p.jsonl", b'{"prompt": "a", "seed": true}\n', "the seed is True"),
        ("p.jsonl", b'{"prompt": "a", "seed": Infinity}\n', "the seed is inf"),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', "half a surrogate pair"),
        ("p.csv", b"prompt\n" + b"x" * 140000 + b"\n", "no CSV that can be read"),
        ("p.json", b'["a"]', "write JSON Lines"),
        ("p.parquet", b"PAR1 but not really", "no Parquet file"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused_in_one_sentence(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        loaded(prompts=str(file))


@pytest.mark.parametrize("name", ["nowhere.txt", "nowhere", "builtin:cats", "."])
def test_a_source_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        loaded(prompts=name)


def test_a_dataset_is_streamed_filtered_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [{"prompt": "short"}, {"prompt": "x" * 16}, {"prompt": "y" * 17}, {"prompt": "z" * 900}]
    calls = []

    def fake(name: str, split: str, streaming: bool) -> list[dict[str, str]]:
        calls.append((name, split, streaming))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert [len(text) for text, _ in loaded(prompts="someone/prompts", images=2)] == [17, 512]
    assert calls == [("someone/prompts", "train", True)]
    loaded(model="black-forest-labs/FLUX.1-schnell", images=2)
    assert calls[1][0] == "yvdao/midjourney-v6"


def test_a_dataset_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_args: object, **_options: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UsageError, match="neither a file here nor a dataset"):
        loaded(prompts="someone/prompts", images=2)
