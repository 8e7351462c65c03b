"""Whatever is done to the files of a store: what is read is right, or an error of ours says what is wrong.

Two kinds of harm.  *Damage* leaves the checksums that name a file as they were: then nothing that is read may differ from
what was written.  *Lies* have all their checksums recomputed, so they are well-formed and false: then nothing but an error
of ours, or data, may come of them, and no request for a terabyte.  Hypothesis chooses, always the same.
"""

import io
import json
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from store import open_store
from store.errors import DamagedError, ForeignError, GranaryError
from store.format import StreamTokens
from store.layout import ROOT, SEAL, STORE_COMMIT, part_commit
from tests.fuzz_victim import Json, Victim, dumped, honest
from tests.small_store import make_store

FEW, MANY = 40, 400
MEMORY = 16 * 2**30
"""bytes of address space beyond which a request fails, as it would on a machine without them"""
JSON_FILES = (ROOT, STORE_COMMIT, part_commit(0), part_commit(1), SEAL)
KINDS = ("packed", "plain")


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


odd_numbers = st.sampled_from([-1, 0, 1, 2, 3, 7, 10**6, 2**31, 2**40, 2**63, 10**30, -(10**30), 0.5, 1e300])
odd_floats = st.sampled_from([float("nan"), float("inf"), -0.0, 1e-300])
odd_texts = st.sampled_from(["", "img_0", "img_9", "joint_0", "all", "real+", "../../etc", "\0", "\ud800", "ü" * 300])
leaves = st.one_of(st.none(), st.booleans(), odd_numbers, odd_floats, odd_texts, st.text(max_size=5))
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Victim]:
    """Stores with every kind of file: compressed, sampled, with scales, pictures, weights."""
    folder = tmp_path_factory.mktemp("fuzz")
    shared: Json = {"n_images": 3, "chunk_images": 2, "steps": (1,), "d_model": 4}
    tokens = {"image_tokens": StreamTokens("sample", 3, 12), "text_tokens": StreamTokens("real+0", 8, 8)}
    make_store(folder / "packed", **shared, **tokens, codec="zstd", weights=True)
    make_store(folder / "plain", **shared, store_dtype="fp8-e4m3", pictures="none")
    return {name: Victim(folder / name) for name in KINDS}


@contextmanager
def harm(victim: Victim) -> Iterator[None]:
    """Heal a store afterwards, and meanwhile let nobody have much memory."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        victim.heal()


def _places(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in a JSON document."""
    yield at
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield from _places(value, (*at, key))


def edited(data: st.DataObject, document: bytes, below: tuple[str, ...] = ()) -> Any:
    """A JSON document in which something below a place is replaced, removed or added."""
    content = json.loads(document)
    inner = content
    for key in below:
        inner = inner[key]
    where = (*below, *data.draw(st.sampled_from(list(_places(inner)))))
    value = data.draw(values)
    if not where:
        return value
    holder = content
    for key in where[:-1]:
        holder = holder[key]
    how = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if how == "remove":
        del holder[where[-1]]
    elif how == "add" and isinstance(holder, dict):
        holder[data.draw(odd_texts)] = value
    else:
        holder[where[-1]] = value
    return content


def damage(victims: Mapping[str, Victim], data: st.DataObject) -> None:
    """Something happens to the bytes of one file."""
    victim = victims[data.draw(st.sampled_from(KINDS))]
    name = data.draw(st.sampled_from(list(victim.files)))
    before = victim.files[name]
    at = data.draw(st.integers(0, max(len(before) - 1, 0)))
    how = data.draw(st.sampled_from(["flip", "cut", "grow", "swap", "delete", "noise"]))
    after: bytes | None = None
    if how == "flip" and before:
        after = before[:at] + bytes([before[at] ^ (1 << data.draw(st.integers(0, 7)))]) + before[at + 1 :]
    elif how == "cut":
        after = before[:at]
    elif how == "grow":
        after = before[:at] + data.draw(st.binary(min_size=1, max_size=9)) + before[at:]
    elif how == "swap":
        after = victim.files[data.draw(st.sampled_from(list(victim.files)))]
    elif how == "noise":
        after = data.draw(st.binary(max_size=200))
    with harm(victim):
        victim.put(name, after)
        victim.refuse_wrong_data(victim.answers(unfinished=True))


def edit(victims: Mapping[str, Victim], data: st.DataObject) -> None:
    """Somebody edits a JSON file, and perhaps its own checksum; the seal over a commit, or the record over zarr.json, he does not."""
    victim = victims[data.draw(st.sampled_from(KINDS))]
    name = data.draw(st.sampled_from(JSON_FILES))
    content = edited(data, victim.files[name])
    own = data.draw(st.booleans()) and name != SEAL
    with harm(victim):
        victim.put(name, honest(content) if own else dumped(content))
        victim.refuse_wrong_data(victim.answers(unfinished=True))


def lie_in_attributes(victims: Mapping[str, Victim], data: st.DataObject) -> None:
    victim = victims[data.draw(st.sampled_from(KINDS))]
    content = edited(data, victim.files[ROOT], ("attributes", "granary"))
    with harm(victim):
        victim.vouch({ROOT: dumped(content)})
        victim.answers()


def lie_in_records(victims: Mapping[str, Victim], data: st.DataObject) -> None:
    victim = victims[data.draw(st.sampled_from(KINDS))]
    name = data.draw(st.sampled_from(JSON_FILES[1:]))
    content = edited(data, victim.files[name])
    with harm(victim):
        victim.vouch({name: honest(content)})
        victim.answers()
        if name != SEAL:
            victim.put(SEAL, None)
            victim.answers(unfinished=True)


def lie_in_arrays(victims: Mapping[str, Victim], data: st.DataObject) -> None:
    """A table, a statistics file or a weights file says something else, or is something else."""
    victim = victims[data.draw(st.sampled_from(KINDS))]
    names = [name for name in victim.files if name.endswith((".parquet", ".safetensors"))]
    name = data.draw(st.sampled_from(names))
    if data.draw(st.integers(0, 3)) == 0:
        at = data.draw(st.integers(0, len(victim.files[name])))
        lie = victim.files[name][:at] + data.draw(st.binary(max_size=30)) + victim.files[name][at:]
    elif name.endswith(".parquet"):
        lie = _other_table(victim.files[name], data)
    else:
        lie = _other_tensors(victim.files[name], data)
    with harm(victim):
        victim.vouch({name: lie})
        victim.answers()


def _other_table(before: bytes, data: st.DataObject) -> bytes:
    table = pq.read_table(io.BytesIO(before))
    how = data.draw(st.sampled_from(["drop", "other", "fewer", "more"]))
    column = data.draw(st.integers(0, table.num_columns - 1))
    if how == "drop":
        table = table.remove_column(column)
    elif how == "other":
        kinds = [
            st.none(),
            st.integers(-5, 5),
            st.text(max_size=3),
            st.lists(st.floats(width=32), max_size=2),
            st.binary(),
        ]
        cells = st.lists(data.draw(st.sampled_from(kinds)), min_size=table.num_rows, max_size=table.num_rows)
        field = table.schema.field(column)
        if data.draw(st.booleans()) and pa.types.is_struct(field.type):
            cells = cells.map(lambda found: [{"bytes": each if isinstance(each, bytes) else b"x"} for each in found])
        table = table.set_column(column, field.name, pa.array(data.draw(cells)))
    else:
        table = table.slice(0, table.num_rows - 1) if how == "fewer" else pa.concat_tables([table, table])
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _other_tensors(before: bytes, data: st.DataObject) -> bytes:
    tensors = dict(safetensors.numpy.load(before))
    name = data.draw(st.sampled_from(sorted(tensors)))
    if data.draw(st.booleans()):
        shape = data.draw(st.sampled_from([(), (0,), (1,), (4,), (5,), (2, 2), (4000,)]))
        dtype = data.draw(st.sampled_from(["float64", "float32", "int64", "uint8", "bool"]))
        number = data.draw(st.sampled_from([0, 1, -1, 2**31, -(2**62), 1e308, float("nan"), float("inf")]))
        with np.errstate(invalid="ignore", over="ignore"):
            tensors[name] = np.full(shape, float(number)).astype(dtype)
    else:
        del tensors[name]
    return bytes(safetensors.numpy.save(tensors))


HARM = (damage, edit, lie_in_attributes, lie_in_records, lie_in_arrays)


@pytest.mark.parametrize("harmful", HARM, ids=lambda each: each.__name__)
@given(data=st.data())
@examples(FEW)
def test_a_harmed_store_gives_errors_of_ours_or_data_that_its_checksums_vouch_for(
    victims: dict[str, Victim], harmful: Callable[..., None], data: st.DataObject
) -> None:
    harmful(victims, data)


@pytest.mark.slow
@pytest.mark.parametrize("harmful", HARM, ids=lambda each: each.__name__)
@given(data=st.data())
@examples(MANY)
def test_a_store_that_is_harmed_over_and_over_does_so_too(
    victims: dict[str, Victim], harmful: Callable[..., None], data: st.DataObject
) -> None:
    harmful(victims, data)


LIES: dict[str, tuple[tuple[str, ...], Any]] = {
    "more images than there can be": (("n_images",), 10**15),
    "an image of a petabyte": (("d_model",), 2**50),
    "tokens beyond number": (("tokens", "img"), {"policy": "all", "kept": 2**60, "total": 2**60}),
    "a negative size": (("chunk_images",), -4),
    "nothing": (("n_images",), 0),
    "a list for a dictionary": (("tokens",), []),
    "a dictionary for a list": (("sites",), {"img_0": 1}),
    "text for a list": (("steps",), "01"),
    "a site twice": (("sites",), ["img_0", "img_0", "txt_0"]),
    "a layer whose name no disk takes": (("sites",), ["img_" + "9" * 300, "txt_0"]),
    "no number": (("guidance",), float("nan")),
    "half a surrogate": (("device",), "\ud800"),
    "a file outside": (("weights",), {"policy": "copy", "files": {"img_0": "../zarr.json", "txt_0": "../zarr.json"}}),
    "a name that ends early": (("weights",), {"policy": "copy", "files": {"img_0": "a\0", "txt_0": "b"}}),
    "a fraction of a seed": (("seed",), 0.5),
    "true for one": (("n_images",), True),
}


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_no_store_has_are_refused_when_it_is_opened(victims: dict[str, Victim], lie: str) -> None:
    victim, (where, value) = victims["plain"], LIES[lie]
    content = json.loads(victim.files[ROOT])
    holder = content["attributes"]["granary"]
    for key in where[:-1]:
        holder = holder[key]
    holder[where[-1]] = value
    with harm(victim):
        victim.vouch({ROOT: dumped(content)})
        with pytest.raises(ForeignError):
            open_store(victim.path)


@pytest.mark.parametrize("depth", [400, 5000, 200_000])
@pytest.mark.parametrize("name", JSON_FILES)
def test_json_that_is_nested_too_deep_is_an_error_of_ours(victims: dict[str, Victim], name: str, depth: int) -> None:
    victim = victims["plain"]
    deep = f'{{"sha256": "0", "attributes": {{"granary": {"[" * depth}{"]" * depth}}}}}'
    with harm(victim):
        victim.put(name, deep.encode())
        found = victim.answers()
        victim.refuse_wrong_data(found)
        assert any(isinstance(answer, GranaryError) for answer in found.values())


@pytest.mark.parametrize(
    "text", [b'{"sha256": NaN}', b'{"sha256": 1e999}', b'{"sha256": "\\ud800"}', b"[]", b"7", b"\xff"]
)
@pytest.mark.parametrize("name", JSON_FILES)
def test_json_that_we_never_write_is_an_error_of_ours(victims: dict[str, Victim], name: str, text: bytes) -> None:
    victim = victims["plain"]
    with harm(victim):
        victim.put(name, text)
        found = victim.answers()
        victim.refuse_wrong_data(found)
        assert any(isinstance(answer, DamagedError | ForeignError) for answer in found.values())


def test_a_folder_in_the_place_of_a_file_is_a_missing_file(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store")
    files = [str(f.relative_to(made.path)) for f in sorted(made.path.rglob("*")) if f.is_file()]
    victim = Victim(made.path)
    for name in [each for each in files if not each.endswith(("/zarr.json", "README.md"))]:
        (made.path / name).unlink()
        (made.path / name).mkdir()
        found = victim.answers(unfinished=True)
        victim.refuse_wrong_data(found)
        assert any(isinstance(answer, GranaryError) for answer in found.values()), name
        (made.path / name).rmdir()
        (made.path / name).write_bytes(victim.files[name])
