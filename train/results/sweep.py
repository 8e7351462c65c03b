"""All dictionaries of a folder side by side: a table, the Pareto front, pictures.

    OUT/sweep.json                  figures, settings and ids of every dictionary; every other file with its checksum; written last
    OUT/sweep.md                    the table and the pictures, as GitHub shows them
    OUT/pareto.png                  L0 against FVU
    OUT/plots/NAME-curves.png       how the training of OUT/NAME/ went; NAME may hold a slash: l1-0.0003/transcoder_img_6
    OUT/plots/NAME-density.png      how dense its features are

Nothing in them depends on path, time or host, or on which runs made which dictionaries.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, get_args

from tqdm import tqdm

from store.errors import ForeignError
from store.files import (
    is_temporary,
    json_bytes,
    read_self_checked,
    remove_leftovers,
    self_checked,
    sha256_bytes,
    write_bytes,
)
from store.strata import GROUPS, Group
from train.dictionaries.checkpoint import CONFIG, LogLine, outline, read_log
from train.dictionaries.dictionary import Dictionary
from train.results.differences import SEEDS, seeds_apart, setting, shown, sparsity_of, varying
from train.results.pareto import figures_of, on_front, pareto, rows_named, unlike
from train.results.plots import curves, density

SWEEP, PAGE, PARETO, PLOTS = "sweep.json", "sweep.md", "pareto.png", "plots"
FORMAT, FORMAT_VERSION = "granary-sweep", 1
FIGURES = ("fvu", "l0", "density", "dead", "cosine", "rows")
FORMS = {"fvu": "{:.4f}", "l0": "{:.1f}", "density": "{:.2f}", "dead": "{:.1f}", "cosine": "{:.4f}", "rows": "{:,}"}
"""how the table writes them; densities and dead shares in percent"""


@dataclass(frozen=True)
class Trained:
    """A finished dictionary of a folder."""

    folder: str
    """relative to OUT, such as `transcoder_img_6` or `l1-0.0003/transcoder_img_6`; the name alone where nobody knows"""
    dictionary: Dictionary
    """without its weights"""
    id: str = ""
    """`sha256-…`, the checksum in its `config.json`, which covers its other files"""
    log: Sequence[LogLine] = ()

    @property
    def what(self) -> str:
        """`img_6 · transcoder · l1 3e-4`: the beginning of a picture's title."""
        sparsity = sparsity_of(self.dictionary)
        where = "" if self.folder == self.dictionary.name else self.folder.rpartition("/")[0]
        words = [str(self.dictionary.site), self.dictionary.config.kind, where or sparsity]
        return " · ".join(word for word in words if word)


def table(dictionaries: Sequence[Dictionary]) -> str:
    """The table of dictionaries by their names, which say kind and site."""
    return text([Trained(dictionary.name, dictionary) for dictionary in dictionaries])


def text(trained: Sequence[Trained]) -> str:
    """One line a dictionary: what it was trained with, rows, FVU, L0, its share of the features, dead share; held-out rows only.

    A text dictionary has two more lines, real tokens and padding, a joint one a third, image tokens.  `*` marks those on the
    Pareto front of their site, kind and held-out rows; where the rows differ between dictionaries, a column `measured on` says
    which they are.  Below several that only their seeds tell apart stand mean and standard deviation.
    """
    lines = cells(trained)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def cells(trained: Sequence[Trained]) -> list[list[str]]:
    """The table as text, its head first."""
    dictionaries = [each.dictionary for each in trained]
    columns = [*varying(dictionaries), *(["measured_on"] if unlike(dictionaries) else [])]
    seeds = {places[-1]: places for places in seeds_apart(dictionaries)}
    fronts = {group: on_front(dictionaries, group) for group in get_args(Group)}
    head = ["dictionary", "sparsity", *(name.replace("_", " ") for name in columns), "rows", "features"]
    figures = ["FVU", "L0", "L0 %", "dead %", "cosine", "held-out rows", "front"]
    lines = [[*head, *figures]]
    for place, each in enumerate(trained):
        config = each.dictionary.config
        about = [
            each.folder,
            sparsity_of(each.dictionary) or "-",
            *(shown(_setting(each.dictionary, name)) for name in columns),
        ]
        about += [f"{config.rows:,}", f"{config.n_features:,}"]
        for group in GROUPS[config.site.stream]:
            found = figures_of(each.dictionary, group)
            if group == "all":
                lines.append([*about, *_figures(found, fronts[group][place])])
            elif found:
                lines.append([f"  {group}", *[""] * (len(about) - 1), *_figures(found, fronts[group][place])])
        if place in seeds:
            plain = [
                "" if name in SEEDS else cell for name, cell in zip(["", "", *columns, "", ""], about, strict=True)
            ]
            lines += _of_seeds([dictionaries[each] for each in seeds[place]], plain[1:])
    if not any("*" in line[-1] for line in lines):
        lines = [line[:-1] for line in lines]
    return lines


def _figures(found: Mapping[str, Any], front: bool) -> list[str]:
    """The figures of a line; `-` for what was not measured."""
    return [*(_cell(name, found.get(name)) for name in FORMS), "*" if front else ""]


def _cell(name: str, value: float | int | None) -> str:
    times = 100 if name in ("density", "dead") else 1
    return ("none" if name == "rows" else "-") if value is None else FORMS[name].format(times * value)


def _of_seeds(dictionaries: Sequence[Dictionary], about: Sequence[str]) -> list[list[str]]:
    """A line for each kind of tokens: mean and standard deviation of what dictionaries of several seeds came to."""
    lines = []
    for group in GROUPS[dictionaries[0].site.stream]:
        found = [figures_of(each, group) for each in dictionaries]
        name, words = f"  mean of {len(found)} seeds", about
        if group != "all":
            name, words = f"{name}, {group}", [""] * len(about)
        if all(found):
            cells = [_of_values(figure, [each.get(figure) for each in found]) for figure in FORMS]
            lines.append([name, *words, *cells, ""])
    return lines


def _of_values(name: str, values: Sequence[float | int | None]) -> str:
    """`0.2500 ± 0.0100`; for the rows, which are the same, their number."""
    known = [value for value in values if value is not None]
    if name == "rows" or len(known) < len(values):
        return _cell(name, known[0] if len(known) == len(values) else None)
    return f"{_cell(name, fmean(known))} ± {_cell(name, stdev(known))}"


def _setting(dictionary: Dictionary, name: str) -> Any:
    return rows_named(dictionary) if name == "measured_on" else setting(dictionary, name)


def save(out: Path) -> list[Trained]:
    """Write table and pictures of every finished dictionary below `out`, whichever run trained it; those dictionaries."""
    trained = sorted(finished(out), key=_place)
    if not trained and not (out / SWEEP).exists():
        return []
    files: dict[str, bytes] = {}
    picture = pareto([each.dictionary for each in trained])
    if picture is not None:
        files[PARETO] = picture
    for each in tqdm(trained, desc="pictures", unit="model", mininterval=0.5, disable=len(trained) < 8):
        if each.log:
            files[f"{PLOTS}/{each.folder}-curves.png"] = curves(each.log, f"{each.what} · training")
        if "density_histogram" in (each.dictionary.metrics or {}):
            title = f"{each.what} · feature densities on held-out rows"
            files[f"{PLOTS}/{each.folder}-density.png"] = density(each.dictionary.metrics or {}, title)
    files[PAGE] = page(trained, files).encode()
    before = _written_before(out)
    for name in before - set(files):
        (out / name).unlink(missing_ok=True)
    for name in {SWEEP, *before, *files}:
        remove_leftovers(out / name)
    for name, content in files.items():
        write_bytes(out / name, content)
    write_bytes(out / SWEEP, json_bytes(self_checked(content_of(trained, files))))
    return trained


def _place(each: Trained) -> tuple[Any, ...]:
    """Where a dictionary stands: site by site, each site's by kind, activation, width and sparsity."""
    config = each.dictionary.config
    l1 = (config.training or {}).get("l1")
    return (
        config.site.stream,
        config.site.layer,
        config.kind,
        config.activation,
        config.n_features,
        config.k or l1 or 0,
        each.folder,
    )


def finished(out: Path) -> Iterator[Trained]:
    """The finished dictionaries in `out` and in the folders in it; a folder of others is left out with a note."""
    if not out.is_dir():
        return
    folders = [path for path in sorted(out.iterdir()) if path.is_dir() and not is_temporary(path)]
    inside = [path for folder in folders if not (folder / CONFIG).exists() for path in sorted(folder.iterdir())]
    for folder in sorted([*folders, *inside]):
        if not (folder / CONFIG).is_file():
            continue
        try:
            dictionary, content = outline(folder), read_self_checked(folder / CONFIG)
        except ForeignError as error:
            print(f"note: left out of the table: {error}")
            continue
        yield Trained(folder.relative_to(out).as_posix(), dictionary, f"sha256-{content['sha256']}", read_log(folder))


def content_of(trained: Sequence[Trained], files: Mapping[str, bytes]) -> dict[str, Any]:
    """What `sweep.json` says."""
    dictionaries = [each.dictionary for each in trained]
    fronts = {group: on_front(dictionaries, group) for group in get_args(Group)}
    entries = []
    for place, each in enumerate(trained):
        config, metrics = each.dictionary.config, each.dictionary.metrics or {}
        groups: dict[Group, Any] = {}
        for group in GROUPS[config.site.stream]:
            if found := figures_of(each.dictionary, group):
                groups[group] = {name: found.get(name) for name in FIGURES} | {"front": fronts[group][place]}
        about = {"folder": each.folder, "id": each.id, "val_pack": metrics.get("pack"), "figures": groups}
        kept = {
            key: value for key, value in config.to_json().items() if key not in ("format", "format_version", "parent")
        }
        entries.append({**kept, **about, "pack": config.parent.pack if config.parent else None})
    checksums = {name: {"bytes": len(data), "sha256": sha256_bytes(data)} for name, data in files.items()}
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "dictionaries": entries, "files": checksums}


def page(trained: Sequence[Trained], files: Mapping[str, bytes]) -> str:
    """`sweep.md`: the table, and the pictures linked, as GitHub shows them."""
    head, *lines = cells(trained)
    words = ["# Dictionaries", ""]
    if PARETO in files:
        words += [f"![L0 against FVU of every dictionary, a panel a site]({PARETO})", ""]
    words += [
        "Figures are those on held-out rows. FVU: share of the variance that is not explained. L0: features active on a row, on the",
        "average; L0 %: of all features. Dead: active on none of the held-out rows. Front: FVU is below 1, and no other dictionary",
        "of the same site and kind, measured on the same rows, has both a lower L0 and a lower FVU. ±: standard deviation.", "",
        f"| {' | '.join([*head, 'pictures'])} |", f"|---|{'---:|' * (len(head) - 1)}---|",
    ]  # fmt: skip
    named = iter(trained)
    for first, *rest in lines:
        links = ""
        if not first.startswith(" "):
            folder = next(named).folder
            links = " ".join(
                f"[{what}]({PLOTS}/{folder}-{what}.png)"
                for what in ("curves", "density")
                if f"{PLOTS}/{folder}-{what}.png" in files
            )
            first = f"[{first}]({folder}/{CONFIG})"
        words.append("| " + " | ".join([first.replace("  ", "&nbsp;&nbsp;", 1), *rest, links]) + " |")
    return "\n".join(words) + "\n"


def _written_before(out: Path) -> set[str]:
    """The files that the last `sweep.json` names: of dictionaries, perhaps, that are gone."""
    if not (out / SWEEP).exists():
        return set()
    files = read_self_checked(out / SWEEP, "Remove it and run the same command again: it is written anew").get("files")
    return (
        {name for name in files if ".." not in name and not name.startswith("/")} if isinstance(files, dict) else set()
    )
