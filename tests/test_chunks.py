"""A chunk's file is what zarr-python writes, and fp8-e4m3 is what its definition says."""

import shutil
from collections.abc import Callable
from pathlib import Path

import crc32c
import ml_dtypes
import numpy as np
import pytest
import zarr
from numcodecs.zstd import Zstd

from store import Site, open_store
from store.chunks import E4M3_MAX, encode, from_e4m3, padded, read_chunk, to_e4m3
from store.errors import DamagedError, NonFiniteError
from store.format import CARRIERS, StreamTokens, array_specs, chunk_file
from store.places import Folder
from store.writer import StoreWriter
from tests.small_store import SmallStore, small_meta, small_part

MakeStore = Callable[..., SmallStore]
DTYPES = tuple(CARRIERS)
IMG = Site.parse("img_0")


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zarr_reads_our_arrays_and_writes_the_same_bytes(
    small_store: MakeStore, tmp_path: Path, dtype: str, codec: str
) -> None:
    made = small_store(
        store_dtype=dtype, codec=codec, image_tokens=StreamTokens("sample", 5, 12),
        text_tokens=StreamTokens("real+0", 8, 8), steps=(1,), pictures="none",
    )  # fmt: skip
    ours = zarr.open_group(made.path, mode="r")
    specs = list(array_specs(made.store.meta))
    assert len(specs) == (10 if dtype == "fp8-e4m3" else 6)
    for spec in specs:
        found = ours[spec.name]
        assert (found.shape, found.chunks, found.dtype) == (spec.shape, spec.chunk, np.dtype(spec.dtype))
        copy = tmp_path / "theirs" / spec.name
        copy.mkdir(parents=True)
        shutil.copy(made.path / spec.name / "zarr.json", copy)
        with zarr.config.set({"array.write_empty_chunks": True}):
            zarr.open_array(copy, mode="r+")[:] = found[:]
        for part in range(made.store.meta.n_parts):
            name = chunk_file(spec.name, part)
            assert (copy.parent / copy.name / Path(name).name).read_bytes() == (made.path / name).read_bytes(), name
    values = ours[f"activations/{IMG.path}/step.1/mlp_out"][:]
    read = made.store.read(IMG, 1, "mlp_out")
    if dtype == "bfloat16":
        np.testing.assert_array_equal(values.view(ml_dtypes.bfloat16), read)
    elif dtype == "fp8-e4m3":
        scale = ours[f"activations/{IMG.path}/step.1/mlp_out_scale"][:]
        exact = values.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale[..., None]
        np.testing.assert_array_equal(exact, read.astype(np.float64))
    else:
        np.testing.assert_array_equal(values, read)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_chunk_is_filled_up_with_a_nan(small_store: MakeStore, dtype: str) -> None:
    made = small_store(store_dtype=dtype, pictures="none", image_tokens=StreamTokens("sample", 5, 12))
    place, carrier = Folder(made.path), CARRIERS[dtype]  # type: ignore[index]
    for spec in array_specs(made.store.meta):
        last = read_chunk(place, chunk_file(spec.name, 2), spec.chunk, spec.dtype, spec.codec)
        rest = last[2:]  # ten images, four a chunk
        if spec.name.startswith("tokens/"):
            assert (rest == -1).all()
        elif spec.dtype == "float32" or spec.dtype == "float16":
            assert np.isnan(rest).all()
        else:
            assert (rest == carrier.fill).all()
            logical = ml_dtypes.bfloat16 if dtype == "bfloat16" else ml_dtypes.float8_e4m3fn
            assert np.isnan(rest.view(logical).astype(np.float32)).all()


def chunk_in(folder: Path, values: np.ndarray, codec: str) -> Path:
    payload, trailer = encode(values, codec)  # type: ignore[arg-type]
    file = folder / "chunk"
    file.write_bytes(bytes(payload) + trailer)
    return file


def read_back(file: Path, values: np.ndarray, codec: str) -> np.ndarray:
    return read_chunk(Folder(file.parent), file.name, values.shape, str(values.dtype), codec)  # type: ignore[arg-type]


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_every_flipped_bit_and_every_missing_end_is_found(tmp_path: Path, codec: str) -> None:
    values = np.repeat(np.arange(6, dtype=np.float32), 5).reshape(2, 3, 5)
    file = chunk_in(tmp_path, values, codec)
    whole = file.read_bytes()
    np.testing.assert_array_equal(read_back(file, values, codec), values)
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        for broken in (bytes(flipped), whole[:place]):
            file.write_bytes(broken)
            with pytest.raises(DamagedError, match="chunk"):
                read_back(file, values, codec)
    file.write_bytes(whole + b"\0")
    with pytest.raises(DamagedError):
        read_back(file, values, codec)


def test_compressed_data_that_lie_about_their_length_are_refused_and_take_no_memory(tmp_path: Path) -> None:
    values = np.zeros((2, 5, 15), np.float32)
    more, fewer = (np.zeros((2, 5, n), np.float32) for n in (16, 14))
    frame = bytes.fromhex("28b52ffd e0") + (2**45).to_bytes(8, "little") + bytes.fromhex("010000")  # 32 TiB, it says
    lies = [Zstd(level=1).encode(more), Zstd(level=1).encode(fewer), frame, b"", b"no zstd at all"]
    for payload in lies:
        (tmp_path / "chunk").write_bytes(payload + crc32c.crc32c(payload).to_bytes(4, "little"))
        with pytest.raises(DamagedError, match="is not 600 bytes of values compressed"):
            read_back(tmp_path / "chunk", values, "zstd")


def test_padding_keeps_the_values_and_fills_the_rest() -> None:
    values = np.arange(6, dtype=np.uint16).reshape(2, 3)
    assert padded(values, 2, 0x7FC0) is values
    np.testing.assert_array_equal(padded(values, 3, 0x7FC0), [[0, 1, 2], [3, 4, 5], [0x7FC0] * 3])
    assert np.isnan(padded(values.astype(np.float32), 3, "NaN")[2]).all()


def e4m3_by_definition(bits: int) -> float:
    """Sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, all ones is NaN."""
    sign, exponent, mantissa = (-1.0) ** (bits >> 7), (bits >> 3) & 15, bits & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


@pytest.mark.parametrize("scale", [2.0**-124, 2.0**-9, 1.0, 2.0**119])
def test_every_e4m3_decodes_to_its_value_times_the_scale(scale: float) -> None:
    every = np.arange(256, dtype=np.uint8).reshape(1, 256)
    expected = np.array([[e4m3_by_definition(bits) * scale for bits in range(256)]])
    np.testing.assert_array_equal(from_e4m3(every, np.array([scale], np.float32)).astype(np.float64), expected)


def test_every_bfloat16_becomes_the_nearest_e4m3_ties_to_even() -> None:
    last = int(np.array(E4M3_MAX, ml_dtypes.bfloat16).view(np.uint16))
    every = np.arange(last + 1, dtype=np.uint16).view(ml_dtypes.bfloat16)  # from 0 to 448
    signed = np.concatenate([every, -every])
    rows = np.stack([signed, np.full_like(signed, E4M3_MAX)], axis=1)  # the greatest of each row is 448: the scale is 1
    bits, scale = to_e4m3(rows)
    assert (scale == 1).all()
    np.testing.assert_array_equal(bits[:, 0], signed.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    finite = np.array([e4m3_by_definition(code) for code in range(127)])
    exact = np.abs(signed.astype(np.float64))
    distance = np.abs(exact[:, None] - finite)
    nearest = distance.min(axis=1)
    even = np.where((distance == nearest[:, None]) & (np.arange(127) % 2 == 0), 1, 0).any(axis=1)
    code = bits[:, 0] & 127
    np.testing.assert_array_equal(np.abs(exact - finite[code]), nearest)
    ties = (distance == nearest[:, None]).sum(axis=1) > 1
    assert ties.any()
    assert (code[ties & even] % 2 == 0).all()


def test_the_scale_is_the_least_power_of_two_that_fits_and_a_row_of_powers_is_exact() -> None:
    peaks = np.exp2(np.arange(-110, 120)).astype(np.float32)
    for factor in (1.0, 1.5, 1.75, 1.765625, 1.9921875):  # 448 is 1.75 * 2^8
        rows = (peaks * factor).astype(ml_dtypes.bfloat16)[:, None]
        bits, scale = to_e4m3(rows)
        mantissa, exponent = np.frexp(scale)
        assert (mantissa == 0.5).all()
        expected = np.log2(peaks) - 8 + (factor > 1.75)
        np.testing.assert_array_equal(exponent - 1, expected)
        if factor <= 1.75:
            np.testing.assert_array_equal(from_e4m3(bits, scale), rows)


@pytest.mark.parametrize("spread", [1e-30, 1.0, 1e4, 1e30])
def test_the_relative_error_of_normal_values_is_between_two_and_three_percent(spread: float) -> None:
    exact = (np.random.default_rng(0).normal(size=(200, 256)) * spread).astype(ml_dtypes.bfloat16)
    stored = from_e4m3(*to_e4m3(exact)).astype(np.float64)
    error = np.sqrt(np.square(stored - exact.astype(np.float64)).sum() / np.square(exact.astype(np.float64)).sum())
    assert 0.02 < error < 0.03


def test_zeros_and_the_smallest_and_the_greatest_values_survive() -> None:
    tiny, huge = ml_dtypes.finfo(ml_dtypes.bfloat16).smallest_subnormal, 1.875 * 2.0**127
    rows = np.array([[0, 0], [-0.0, 0], [tiny, 0], [-tiny, 3 * tiny], [huge, -huge], [huge, 1]], ml_dtypes.bfloat16)
    bits, scale = to_e4m3(rows)
    stored = from_e4m3(bits, scale).astype(np.float64)
    assert (scale[:2] == 1).all()
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    np.testing.assert_array_equal(stored[:4], rows[:4].astype(np.float64))
    np.testing.assert_array_equal(stored[4:], [[huge, -huge], [huge, 0]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_nan_as_a_whole_and_no_other(bad: float) -> None:
    rows = np.ones((3, 4), ml_dtypes.bfloat16)
    rows[1, 2] = bad
    bits, scale = to_e4m3(rows)
    stored = from_e4m3(bits, scale).astype(np.float32)
    assert np.isnan(scale[1])
    assert np.isnan(stored[1]).all()
    np.testing.assert_array_equal(stored[[0, 2]], 1)


def test_the_few_values_that_would_round_to_infinity_are_refused(tmp_path: Path) -> None:
    meta = small_meta(4, sites=("img_0",), steps=(0,), store_dtype="fp8-e4m3", pictures="none")
    values = {
        (IMG, 0, point): np.full((4, 12, 16), 1.99 * 2.0**127).astype(ml_dtypes.bfloat16) for point in meta.points
    }
    writer = StoreWriter.open_or_create(tmp_path / "store", meta)
    with pytest.raises(NonFiniteError, match="img_0 mlp_in at step 0 of image 0"):
        writer.write_part(0, small_part(meta, 0, values, ["p"] * 4))


def test_what_is_read_of_an_fp8_store_is_a_power_of_two_times_e4m3(small_store: MakeStore) -> None:
    made = small_store(store_dtype="fp8-e4m3", pictures="none")
    store = open_store(made.path)
    for key, exact in made.values.items():
        read = store.read(*key)
        assert read.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(read, from_e4m3(*to_e4m3(exact.astype(ml_dtypes.bfloat16))))
        worst = np.abs(read.astype(np.float32) - exact) / np.abs(exact).max(axis=-1, keepdims=True)
        assert worst.max() <= 1 / 16
