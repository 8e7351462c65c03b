"""What `faithfulness` prints at its end: the tables in brief."""

from collections.abc import Sequence
from pathlib import Path

from analyze.faithfulness.publishing import Results
from analyze.faithfulness.table import Row, figure, of_scope
from store.sizes import many

COLUMNS = {
    "l0": "L0", "fvu": "FVU", "cosine": "cosine", "latent_fvu": "latents off %", "recovered": "recovered %", "psnr": "PSNR", "ssim": "SSIM",
    "kept_colour": "colour kept %", "kept_shape": "shape kept %",
}  # fmt: skip


def printed(results: Results | None, out: Path, measured: int, pictures: int, forwards: int, seconds: float) -> str:
    """A table of the splicings at all steps, how exactly errors make up for them, and what it took."""
    if results is None:
        return ""
    rows = [row for row in results.summary.to_pylist() if row["every_step"]]
    lines = [*_table(rows), *_exact(results)]
    lines.append(
        f"faithfulness: {many(measured, 'splicing')} measured ({len(results.summary):,} in all), {many(pictures, 'picture')} drawn in "
        f"{forwards:,} passes through the transformer, {seconds:.0f} s -> {out / 'faithfulness.md'}"
    )
    return "\n".join(lines)


def _table(rows: Sequence[Row]) -> list[str]:
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    ordered = [*of_scope(rows, "site"), *(row for row in rows if "site" not in row["scopes"].split(","))]
    ordered.sort(
        key=lambda row: ("site" not in row["scopes"].split(","), row["sites"] if "site" in row["scopes"] else "")
    )
    cells = [["dictionaries", "sites", *(COLUMNS[name] for name in names)]]
    cells += [[row["group"], row["sites"], *(figure(name, row.get(name)) for name in names)] for row in ordered]
    widths = [max(len(line[place]) for line in cells) for place in range(len(cells[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]


def _exact(results: Results) -> list[str]:
    if results.exactness is None:
        return []
    rows = results.exactness.to_pylist()
    worst = {way: max(row["largest"] for row in rows if row["errors"] == way) for way in ("live", "kept")}
    return [
        f"errors added back: final latents (RMS {rows[0]['latent_rms']:.2f}) differ from the plain ones by {worst['live']:.1e} at most "
        f"with the errors of the same run, by {worst['kept']:.1e} with those of the plain run, over {many(len(rows), 'splicing')}"
    ]
