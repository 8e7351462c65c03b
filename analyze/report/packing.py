"""What the page loads: classic scripts that hand JSON over, numbers in base64, heat quantised to 256 levels.

A browser refuses `fetch` and ES modules on `file://`, but runs `<script src>`: every piece of data is one call of
`granary.take(name, value)`.  Columns of numbers are the bytes of little-endian arrays in base64: they unpack in milliseconds
where a JSON list of as many numbers takes seconds.
"""

import base64
import json
from typing import Any

import numpy as np
from jaxtyping import Float, Int

LEVELS = 255
FORMS = {"f4": "<f4", "i4": "<i4", "u2": "<u2", "u1": "u1"}


def script_bytes(name: str, value: Any) -> bytes:
    """`granary.take("NAME", …);`, keys sorted, so that equal content is equal bytes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return f"granary.take({json.dumps(name)},{text});\n".encode()


def packed(values: np.ndarray, form: str) -> str:
    """The array's bytes in base64, as `f4` (float32), `i4` (int32), `u2` (uint16) or `u1` (uint8)."""
    return base64.b64encode(np.ascontiguousarray(values, FORMS[form]).tobytes()).decode()


def rounded(value: float, digits: int = 4) -> float:
    """The value with so many significant digits: a third of the bytes of a float's own."""
    return float(f"{value:.{digits}g}")


def packed_heat(
    values: Float[np.ndarray, " token"], positions: Int[np.ndarray, " token"], total: int
) -> tuple[float, str]:
    """The greatest value, and the values over all `total` tokens in 256 levels of it.

    Whichever is shorter: `d` and a byte a token up to the last that is not 0, or `s` and for each token that is not 0 the gap
    since the one before (seven bits a byte, the lowest first, the eighth says that more follow) and its level.
    """
    levels = np.zeros(total, np.uint8)
    peak = float(values.max()) if len(values) else 0.0
    if peak <= 0:
        return 0.0, "s"
    levels[positions] = np.round(np.clip(values / peak, 0, 1) * LEVELS).astype(np.uint8)
    active = np.flatnonzero(levels)
    sparse = bytearray()
    before = -1
    for place in active.tolist():
        gap = place - before - 1
        while gap > 127:
            sparse.append(gap & 127 | 128)
            gap >>= 7
        sparse += bytes((gap, int(levels[place])))
        before = place
        if len(sparse) > active[-1]:
            return peak, "d" + base64.b64encode(levels[: active[-1] + 1].tobytes()).decode()
    return peak, "s" + base64.b64encode(bytes(sparse)).decode()


def unpacked_heat(text: str, peak: float, total: int) -> Float[np.ndarray, " token"]:
    """What `packed_heat` packed, to within half a level: the page's script does the same."""
    levels = np.zeros(total, np.uint8)
    data = base64.b64decode(text[1:])
    if text[0] == "d":
        levels[: len(data)] = np.frombuffer(data, np.uint8)
    else:
        place, cursor = -1, 0
        while cursor < len(data):
            gap = shift = 0
            while data[cursor] & 128:
                gap |= (data[cursor] & 127) << shift
                shift, cursor = shift + 7, cursor + 1
            place += (gap | data[cursor] << shift) + 1
            levels[place] = data[cursor + 1]
            cursor += 2
    return levels.astype(np.float32) * np.float32(peak / LEVELS)
