"""One array in a file of others: where its values lie, by the header of a `.npy` or `.safetensors` file.

A file's length is checked against its header.  Nothing is unpickled, ever.  Files are read and not mapped: pages of a map
count as memory of the process, and a mapped file that somebody truncates kills it.
"""

import ast
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from store.errors import DamagedError, UsageError

SUFFIXES = (".npy", ".safetensors")
DEFAULT_KEY = "activations"
OF_SAFETENSORS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
NO_FLOATS = np.dtype("V1")
HEADER_MOST = 100 * 2**20
"""longest header that the safetensors format admits"""
NPY_HEADER_MOST = 2**20

FROM_TORCH = (
    "it is a pickle of torch, which this program never opens. Convert it where torch is:\n"
    "    tensor = torch.load({name!r}, weights_only=True, mmap=True)\n"
    '    safetensors.torch.save_file({{"activations": tensor.contiguous()}}, {target!r})'
)
REFUSED = {
    ".npz": "it is an archive: unpack it (unzip) and give the .npy inside",
    ".pkl": "a pickle can run any program and is never opened: save the array with numpy.save",
    ".h5": "HDF5 is not read here: save the array with numpy.save, or as safetensors",
}
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Stored:
    """One array in a file: where its values lie."""

    file: Path
    key: str | None
    """its name among the arrays of the file"""
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, first: int, count: int) -> np.ndarray:
        """`count` values beginning with number `first`, flat; `DamagedError` when the file ends before them."""
        values = np.empty(count, self.dtype)
        buffer = values.view(np.uint8).data
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + first * self.dtype.itemsize)
            while buffer:
                done = file.readinto(buffer)
                if not done:
                    raise DamagedError(f"{self.file} became shorter while it was read: give it back, and go on")
                buffer = buffer[done:]
        return values


def find_array(file: Path, key: str | None, axes: tuple[int, ...]) -> Stored:
    """The array in a file: of a safetensors file that called `key`, else `activations`, else the only one with so many `axes`.

    Every refusal is a `UsageError` that says what was found and what to do.
    """
    suffix = file.suffix.lower()
    if not file.exists():
        raise UsageError(f"there is no file {file}")
    if suffix in TORCH_SUFFIXES:
        raise UsageError(f"{file} cannot be imported: {from_torch(file)}")
    if key is not None and suffix == ".npy":
        raise UsageError(f"{file} holds one array, which has no name: leave out --key {key}")
    if suffix not in SUFFIXES:
        raise UsageError(f"{file} cannot be imported: {REFUSED.get(suffix, 'give a .npy or a .safetensors file')}")
    found = _in_npy(file) if suffix == ".npy" else _in_safetensors(file, key, axes)
    if min(found.shape, default=1) < 1:
        raise UsageError(f"{file} holds {about(found)}: there is nothing in it")
    try:
        f"{file.name}{found.key}".encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{str(file)!r}: its name is not UTF-8, and a store says what it was made from: rename it"
        ) from None
    return found


def from_torch(file: Path) -> str:
    """Why a file of torch is not opened, and what to do instead."""
    return FROM_TORCH.format(name=file.name, target=file.with_suffix(".safetensors").name)


def _in_npy(file: Path) -> Stored:
    with file.open("rb") as opened:
        try:
            shape, fortran, dtype = _npy_header(opened)
        except (ValueError, KeyError, SyntaxError, TypeError, OverflowError, RecursionError, MemoryError) as error:
            raise UsageError(f"{file} is no .npy file that can be read: {error}") from None
        offset = opened.tell()
    if dtype == np.dtype("V2"):  # what NumPy makes of the bfloat16 of ml_dtypes when it saves it
        dtype = np.dtype(ml_dtypes.bfloat16)
    if dtype.hasobject:
        raise UsageError(f"{file} holds Python objects, which only a pickle carries, and pickles are never opened")
    if dtype.newbyteorder("=") not in [np.dtype(each) for each in OF_SAFETENSORS.values()]:
        raise UsageError(f"{file} holds {dtype}: activations are float32, float16, bfloat16 or float64")
    if fortran and len(shape) > 1:
        raise UsageError(
            f"{file} is in Fortran order, in which an image is scattered over the whole file. Write it again in C order: "
            'numpy.save("c.npy", numpy.ascontiguousarray(numpy.load(FILE, mmap_mode="r")))'
        )
    found = Stored(file, None, offset, dtype, shape)
    if file.stat().st_size != offset + found.nbytes:
        raise UsageError(
            f"{file} has {file.stat().st_size:,} bytes where its header promises {offset + found.nbytes:,} "
            f"({about(found)}): it was truncated, or is still being written"
        )
    return found


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and dtype.  (NumPy's own reader meets a broken header with errors of all kinds.)"""
    magic = file.read(8)
    if len(magic) < 8 or magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
        raise ValueError("it does not begin as one")
    length = int.from_bytes(file.read(2 if magic[6] == 1 else 4), "little")
    if length > NPY_HEADER_MOST:
        raise ValueError(f"its header has {length:,} bytes")
    header = ast.literal_eval(file.read(length).decode("utf-8" if magic[6] == 3 else "latin-1").strip())
    shape, fortran, kind = header["shape"], header["fortran_order"], header["descr"]
    if not isinstance(shape, tuple) or any(type(n) is not int or n < 0 for n in shape) or not isinstance(kind, str):
        raise ValueError(f"its header says {header}")
    return shape, bool(fortran), np.dtype(kind)


def _in_safetensors(file: Path, key: str | None, axes: tuple[int, ...]) -> Stored:
    arrays = dict(_safetensors(file))
    if key is None and DEFAULT_KEY not in arrays:
        floats = {name: len(stored.shape) for name, stored in arrays.items() if stored.dtype != NO_FLOATS}
        fitting = [name for name, count in floats.items() if count in axes]
        key = fitting[0] if len(fitting) == 1 else None
    key = key or DEFAULT_KEY
    if key not in arrays:
        has = "; ".join(f"{name}: {about(stored)}" for name, stored in arrays.items()) or "nothing"
        raise UsageError(f"{file} holds no array {key!r}: say which with --key. It holds {has}")
    if arrays[key].dtype == NO_FLOATS:
        raise UsageError(f"{file}: {key} is no array of float32, float16, bfloat16 or float64, which activations are")
    return arrays[key]


def _safetensors(file: Path) -> Iterator[tuple[str, Stored]]:
    """Every array of a safetensors file; those of other dtypes as raw bytes."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, HEADER_MOST):
            raise UsageError(f"{file} is no safetensors file, or was truncated ({size:,} bytes)")
        try:
            header = json.loads(opened.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            for name, entry in sorted(entries.items()):
                dtype = np.dtype(OF_SAFETENSORS.get(entry["dtype"], NO_FLOATS))
                shape, (first, last) = tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
                stored = Stored(file, name, 8 + length + int(first), dtype, shape)
                if dtype != NO_FLOATS and (min(shape, default=1) < 0 or last - first != stored.nbytes or first < 0):
                    raise ValueError(f"{name} has {last - first} bytes for {about(stored)}")
                if 8 + length + last > size:
                    raise UsageError(
                        f"{file} has {size:,} bytes where its header promises at least {8 + length + last:,} (for {name}): "
                        "it was truncated, or is still being written"
                    )
                yield name, stored
        except UsageError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UsageError(f"{file} has no safetensors header that can be read: {error}") from None


def about(piece: Stored) -> str:
    """`float32 48x64x48`."""
    name = "of another dtype," if piece.dtype == NO_FLOATS else piece.dtype.name
    return f"{name} {'x'.join(map(str, piece.shape)) or 'a single number'}"
