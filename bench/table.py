"""The table in words: one form for the terminal and for a README, a Markdown table whose columns are aligned."""

from collections.abc import Iterator, Mapping

from bench.lines import Line, spread
from store.sizes import human_size

COLUMNS: dict[str, int] = {
    "group": 9, "work": 44, "ours": 7, "beside": 36, "its": 7, "ours/its": 8, "goal": 15, "moved": 7, "operations": 10,
    "floor": 13, "ours/floor": 10,
}  # fmt: skip
TEXT = ("group", "work", "beside", "goal")
"""columns that begin at the left"""


def head() -> list[str]:
    """The names of the columns, and the rule below them."""
    rule = {name: "-" * (width - 1) + ("-" if name in TEXT else ":") for name, width in COLUMNS.items()}
    return [_row({name: name for name in COLUMNS}), _row(rule)]


def rows(group: str, line: Line, rates: Mapping[str, float]) -> Iterator[str]:
    """A row for the first peer with everything about the line, and one for each of the others."""
    cells = {"group": group, "work": line.what, "ours": seconds_text(line.best)}
    if line.moved:
        cells["moved"] = human_size(line.moved)
    if line.operations:
        cells["operations"] = count_text(line.operations)
    if floor := line.floor(rates):
        cells["floor"] = f"{seconds_text(floor[0])} {floor[1]}"
        cells["ours/floor"] = ratio_text(line.best / floor[0])
    for peer in line.peers or (None,):
        if peer is not None:
            ratio = line.ratio(peer)
            cells |= {"beside": peer.name, "its": seconds_text(min(peer.seconds)), "ours/its": ratio_text(ratio)}
            if peer.goal is not None:
                cells["goal"] = f"≤ {peer.goal:.3g} {'met' if ratio <= peer.goal else 'missed'}"
        yield _row(cells)
        cells = {}


def _row(cells: Mapping[str, str]) -> str:
    shown = (
        cells.get(name, "").ljust(width) if name in TEXT else cells.get(name, "").rjust(width)
        for name, width in COLUMNS.items()
    )  # fmt: skip
    return f"| {' | '.join(shown)} |"


def notes(groups: Mapping[str, list[Line]]) -> list[str]:
    """What is to be said about single lines, below the table; then which line's runs lie farthest apart."""
    found = [f"- {name}, {line.what}: {line.note}" for name, lines in groups.items() for line in lines if line.note]
    apart = [(spread(line.ours), f"{name}, {line.what}") for name, lines in groups.items() for line in lines]
    if apart:
        most, where = max(apart)
        found.append(f"- times are the best of several runs by turns; medians lie at most {most:.0%} above ({where})")
    return found


def seconds_text(seconds: float) -> str:
    """`12.3 s`, `4.56 ms`, `789 µs`: three digits."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= factor or unit == "µs":
            return f"{_three(seconds / factor)} {unit}"
    raise AssertionError("unreachable")


def ratio_text(ratio: float) -> str:
    """Three digits, never an exponent: `0.034`, `1.08`, `28.3`, `1240`."""
    return _three(ratio) if ratio >= 0.1 else f"{ratio:.3f}"


def count_text(operations: float) -> str:
    """`103 GFLOP`"""
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if operations >= factor:
            return f"{_three(operations / factor)} {unit}FLOP"
    return f"{operations:.0f} FLOP"


def _three(value: float) -> str:
    """Three digits; never an exponent."""
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}"
