"""Where graphs lie in OUT, and that OUT holds nothing else.

    OUT/run.json                      store and choices that every graph of OUT was made with
    OUT/nodes.parquet, …, facts.json  the graph, where it is the only one; else
    OUT/graphs/NAME/…                 one folder a graph
    OUT/summary.parquet               a row a graph, whichever run made it; and one for each target of the last run without a graph
    OUT/index.html, OUT/page/         the page of all of them
    OUT/circuit-tracer/               all of them in that program's form, where it was asked for

A graph's folder holds its tables per token, `positional.json`, `aggregated/` (over tokens, pruned) and `graph.json` (the same
in DifFRACT's form).  `facts.json` comes last: a folder without it is made again.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analyze.circuits.exchange import difract
from analyze.circuits.graph import Graph
from store.errors import DamagedError, ForeignError, MismatchError, StoreError, UsageError
from store.files import is_temporary, publish, read_json, write_json
from store.sizes import human_size
from train.claim import refuse_place

RUN, FACTS, THREADS = "run.json", "facts.json", "threads"
FORMAT, VERSION = "granary graphs", 1


def graph_folder(out: Path, name: str, alone: bool) -> Path:
    """Where a graph lies: OUT itself when it is the only one."""
    return out if alone else out / "graphs" / name


def graph_folders(out: Path) -> list[Path]:
    """The folders of all finished graphs in OUT, by name."""
    if (out / FACTS).exists():
        return [out]
    return sorted(path.parent for path in out.glob(f"graphs/*/{FACTS}"))


def write_graph(folder: Path, graph: Graph, aggregated: Graph) -> None:
    """Publish a graph in all its forms, its facts last; `aggregated` is the pruned one over tokens."""
    aggregated.write(folder / "aggregated")
    difract.write(aggregated, folder / "graph.json")
    write_positional(folder / "positional.json", graph)
    graph.write(folder)


def write_positional(path: Path, graph: Graph) -> None:
    """Publish the edges by the names of their nodes: `{"edges": [{"source", "target", "attribution"}]}`, a line an edge."""
    names = [json.dumps(name) for name in graph.names]
    assert np.isfinite(graph.attributions).all()  # or it would be no JSON

    def fill(temporary: Path) -> None:
        with temporary.open("w") as file:
            file.write('{"edges": [')
            before = "\n"
            for source, target, value in zip(
                graph.sources.tolist(), graph.targets.tolist(), graph.attributions.tolist(), strict=True
            ):
                file.write(
                    f'{before}{{"source": {names[source]}, "target": {names[target]}, "attribution": {value!r}}}'
                )
                before = ",\n"
            file.write("\n]}\n")

    publish(path, fill)


def check_claim(out: Path, record: Mapping[str, Any]) -> None:
    """Refuse an OUT that holds something else, graphs of another store, or graphs made with other choices."""
    refuse_place(out)
    if not (out / RUN).exists():
        if out.exists() and not all(is_temporary(path) for path in out.iterdir()):
            raise UsageError(f"{out} is not empty and holds no graphs: choose another --out")
        return
    found = read_json(out / RUN)
    if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise ForeignError(f"{out / RUN} is not the record of graphs in format {VERSION}: choose another --out")
    if found.get("store") != record["store"]:
        raise MismatchError(
            f"{out} holds graphs of store {found.get('store')}, not of {record['store']}: choose another --out"
        )
    if not graph_folders(out):  # of a run that made none
        return
    before, now = found.get("settings"), record["settings"]
    if not isinstance(before, dict):
        raise ForeignError(
            f"{out / RUN} does not say with what settings the graphs there were made: choose another --out"
        )
    for key in sorted({*before, *now} - {THREADS}):
        if before.get(key) != now.get(key):
            was, is_now = (
                human_size(v) if key == "memory" and isinstance(v, int) else v for v in (before.get(key), now.get(key))
            )
            if was == is_now:
                was, is_now = before.get(key), now.get(key)
            raise UsageError(
                f"{out} holds graphs made with --{key.replace('_', '-')} {was}, now {is_now}: choose another "
                "--out, or the setting that they were made with"
            )
    if found.get("alone") != record["alone"]:
        one, several = "one graph, in OUT itself", "a graph each of several targets, in OUT/graphs"
        held, asked = (one, several) if found.get("alone") else (several, one)
        raise UsageError(f"{out} holds {held}; this command makes {asked}: choose another --out")


def threads_of(out: Path) -> int | None:
    """With how many threads the graphs of OUT were made; None where there are none yet.  After `check_claim`."""
    if not (out / RUN).exists() or not graph_folders(out):
        return None
    found = read_json(out / RUN).get("settings", {}).get(THREADS)
    return found if isinstance(found, int) and found > 0 else None


def check_dictionaries(out: Path, dictionaries: Mapping[str, str]) -> None:
    """Refuse an OUT with a graph of other dictionaries (site -> identity) of these sites: features of one number would differ."""
    for folder in graph_folders(out):
        _refuse_other(folder, dictionaries, False)


def claim(out: Path, record: Mapping[str, Any]) -> None:
    """Mark OUT as the place of these graphs; under the lock, after `check_claim`."""
    for leftover in out.glob(".*.tmp"):  # of a process that was killed
        leftover.unlink()
    said = {"format": FORMAT, "version": VERSION, **record}
    if not (out / RUN).exists() or read_json(out / RUN) != said:
        write_json(out / RUN, said)


def dictionaries_of(folder: Path) -> dict[str, str]:
    """Site -> identity of the transcoders that a graph was made with."""
    said = facts_of(folder).get("transcoders") or {}
    return {site: str(of.get("identity") if isinstance(of, dict) else of) for site, of in said.items()}


def damage(folder: Path) -> str | None:
    """Why a finished graph cannot be read; None where nothing is seen to be wrong with it."""
    try:
        Graph.read(folder / "aggregated")
        for name in ("nodes", "edges"):
            pq.read_metadata(folder / f"{name}.parquet")
    except StoreError as error:
        return str(error)
    except (OSError, pa.ArrowException) as error:
        return f"{folder} cannot be read ({error}): remove {folder} and run the same command"
    return None


def is_done(folder: Path, asked: list[str], dictionaries: Mapping[str, str]) -> bool:
    """Whether the graph is there; refuses one of other targets, or of other dictionaries (site -> identity)."""
    if not (folder / FACTS).exists() or not (folder / "aggregated" / FACTS).exists():
        return False
    facts = facts_of(folder)
    if facts.get("asked") != asked:
        there = " and ".join(map(str, facts.get("asked") or ["another target"]))
        raise UsageError(
            f"{folder} holds the graph of {there}, not of {' and '.join(asked)}: choose another --out or another name"
        )
    _refuse_other(folder, dictionaries, True)
    return True


def facts_of(folder: Path) -> dict[str, Any]:
    """What a graph's folder says of it; `ForeignError` where that is no such thing."""
    remedy = f"remove {folder} and run the same command"
    try:
        facts = read_json(folder / FACTS)
    except DamagedError:
        raise DamagedError(f"{folder / FACTS} cannot be read: {remedy}") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("transcoders"), dict | None):
        raise ForeignError(f"{folder / FACTS} is not the record of a graph: {remedy}")
    return facts


def _refuse_other(folder: Path, dictionaries: Mapping[str, str], every: bool) -> None:
    """Refuse a graph made with other dictionaries of the sites that both have, or of `every` site that one has."""
    there = dictionaries_of(folder)
    for site in sorted({*there, *dictionaries} if every else {*there} & {*dictionaries}):
        if there.get(site) != dictionaries.get(site):
            raise MismatchError(
                f"{folder} was made with another dictionary of {site}: {there.get(site, 'none')[:16]}…, now "
                f"{dictionaries.get(site, 'none')[:16]}…: choose another --out for these dictionaries"
            )
