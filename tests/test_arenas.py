"""The memory of parts is used again, and never while somebody holds an array of it."""

import ml_dtypes
import numpy as np
import pytest
import torch

from harvest.arenas import ALIGNED, Arenas
from harvest.staging import as_tensor

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = [(2, 3, 4, 5), (7,), (1, 64, 16)]


def address(array: np.ndarray) -> int:
    return int(array.ctypes.data)


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float16), np.dtype(np.float32)])
def test_arrays_lie_side_by_side_and_do_not_overlap(dtype: np.dtype) -> None:
    made = Arenas().arrays(SHAPES, dtype)
    assert [(array.shape, array.dtype) for array in made] == [(shape, dtype) for shape in SHAPES]
    for number, array in enumerate(made):
        assert array.flags.c_contiguous and array.flags.writeable and address(array) % ALIGNED == 0
        array.fill(number)
    assert [set(array.astype(float).ravel()) for array in made] == [{0.0}, {1.0}, {2.0}]


def test_memory_is_used_again_when_the_last_view_of_it_is_gone() -> None:
    arenas = Arenas()
    first, second, third = arenas.arrays(SHAPES, BFLOAT16)
    begin = address(first)
    view, tensor = first[1, 2:], as_tensor(second)
    del first, second, third
    assert not arenas._free  # there are a view of one, and a tensor of another
    del view
    assert not arenas._free
    other = tensor[2:].view(torch.int16)
    del tensor
    assert not arenas._free
    del other
    assert address(arenas.arrays(SHAPES, BFLOAT16)[0]) == begin


def test_two_parts_by_turns_need_two_blocks_and_a_shorter_one_no_third() -> None:
    arenas, begins, held = Arenas(), set(), list[list[np.ndarray]]()
    for count in (8, 8, 8, 8, 3):
        del held[:-1]  # the one before the last is written
        held.append(arenas.arrays([(count, 16), (count, 4)], BFLOAT16))
        begins.add(address(held[-1][0]))
    assert len(begins) == 2


def test_blocks_that_are_too_small_or_too_many_are_let_go() -> None:
    arenas = Arenas()
    arenas.arrays([(4,)], BFLOAT16)
    (large,) = arenas.arrays([(4096,)], BFLOAT16)
    large.fill(1)
    (small,) = arenas.arrays([(4,)], BFLOAT16)
    assert not np.shares_memory(small, large)
    del large, small
    assert len(arenas._free) == 2
    taken = arenas.arrays([(4,)], BFLOAT16)
    assert taken and not arenas._free
