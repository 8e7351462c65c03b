"""The page of graphs: `index.html` and what it loads, from disk or from any web server.

    OUT/index.html              the page; `report/graphs.html` beside a report
    OUT/page/static/, *.css     scripts and styles of ours
    OUT/page/libraries/d3.js    D3's modules for zooming, finding the nearest node and drawing, with their licences
    OUT/page/data/graphs.js     which graphs there are; data/graphs/NAME.js: one of them, per token and over tokens
    OUT/page/pictures/000/17.webp   each traced picture once

D3's modules, 100 KB, and a canvas of ours: with 2,000 nodes and 20,000 edges Cytoscape.js 3.34 took 3.9 s to the first view and
0.8 s a move where D3 takes a tenth (measured in headless Chromium on two cores), and sigma.js needs WebGL.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analyze.circuits.folders import graph_folders
from analyze.circuits.graph import Graph
from analyze.circuits.viewer.columns import MOST_EDGES, view_columns
from analyze.labels.book import LabelBook
from analyze.report.columns import readable
from analyze.report.folder import ReportFolder
from analyze.report.html import colour_table
from analyze.report.packing import packed
from analyze.report.picture_files import FOLDER_IMAGES, write_pictures
from store import Store
from store.errors import ForeignError, MismatchError, UsageError
from store.files import read_json, write_bytes

REPORT_SCRIPTS = (
    "loading.js",
    "packed.js",
    "colours.js",
    "theme.js",
    "labels.js",
    "features.js",
    "heat.js",
    "examples.js",
)
"""scripts of the report that the page of graphs uses too"""
SCRIPTS = (
    "words.js", "network.js", "grouping.js", "layers.js", "address.js", "ink.js", "painting.js", "drawing.js", "svg.js", "traced.js",
    "panel.js", "supernodes.js", "controls.js", "graph_keys.js", "graphs.js",
)  # fmt: skip
"""in the order in which they run"""
LIBRARIES = (
    "dispatch", "color", "interpolate", "timer", "ease", "selection", "transition", "drag", "zoom", "quadtree", "path", "shape",
)  # fmt: skip
"""D3's modules, each after those that it needs"""
SIDE = 512
"""pixels of the longer side of a traced picture"""
PAGE_BYTES, EDGE_BYTES = 40_000, 30
"""of a graph's picture and facts, and of each of its edges with what it brings along, per token and over tokens"""


def write_pages(
    folders: Sequence[Path], out: Path, store: Store | None = None, labels: Mapping[str, LabelBook] | None = None
) -> Path:
    """Write `OUT/index.html`, one page for all these graphs; returns its place.

    `folders`: of finished graphs (`Graph.write`, and `aggregated/` in it where there is one).  `store`: the one that they were traced
    in, for pictures and words of the prompt; None: without.  `labels`: a dictionary's identity -> what its features are called.
    `ForeignError` for a folder without a graph, `MismatchError` for a graph of another store.  Equal graphs give equal bytes.
    """
    page = ReportFolder(out / "page")
    (out / "index.html").unlink(missing_ok=True)
    contents = write_graphs(page, folders, store, None)
    books = labels or {}
    known = {of["name"]: of["identity"] for entry in contents["graphs"] for of in entry["dictionaries"].values()}
    page.script(
        "labels",
        {
            name: [asdict(label) for label in books[identity].labels]
            for name, identity in known.items()
            if identity in books
        },
    )
    page.write("report.css", resources.files("analyze.report").joinpath("templates", "report.css").read_bytes())
    for name in REPORT_SCRIPTS:
        page.write(
            f"static/{name}", resources.files("analyze.report").joinpath("templates", "static", name).read_bytes()
        )
    page.script("colours", packed(colour_table(), "u1"))
    page.sweep()
    write_bytes(out / "index.html", rendered("page/", False, contents))
    return out / "index.html"


def graphs_in(places: Sequence[Path]) -> list[Path]:
    """The folders of all graphs in these places, each once: what `analyze graph --out` was told, or folders of single graphs."""
    folders: dict[Path, Path] = {}
    for place in places:
        if not (found := graph_folders(place)):
            raise UsageError(f"{place} holds no graph: give what python -m analyze graph wrote (--graphs)")
        for folder in found:
            folders.setdefault(folder.resolve(), folder)
    return list(folders.values())


def check_graphs(places: Sequence[Path], store: Store) -> None:
    """Refuse places without graphs, and graphs that are not of this store, before anything is written."""
    for folder in graphs_in(places):
        _refuse_other_store(folder, _facts(folder), store)


def planned(places: Sequence[Path]) -> tuple[int, int]:
    """Files and about how many bytes these graphs take in a report, pictures included."""
    folders = graphs_in(places)
    edges = [pq.read_metadata(folder / "edges.parquet").num_rows for folder in folders]
    return len(SCRIPTS) + 5 + 2 * len(folders), sum(PAGE_BYTES + EDGE_BYTES * min(count, MOST_EDGES) for count in edges)


def write_beside_report(
    folder: ReportFolder,
    places: Sequence[Path],
    store: Store,
    dictionaries: Mapping[str, str],
    steering: bool = False,
) -> list[str]:
    """Write `graphs.html` into the folder of a report; the names of the graphs.

    `places`: what `analyze graph --out` was told, or folders of single graphs.  `dictionaries`: identity -> name in the report; with
    them the page shows example pictures of features, and the report's feature pages name the graphs that a feature stands in.
    `steering`: whether the report has a page of steering too, to be linked.
    """
    contents = write_graphs(folder, graphs_in(places), store, dictionaries)
    folder.write("graphs.html", rendered("", True, contents, steering))
    return [entry["name"] for entry in contents["graphs"]]


def write_graphs(
    folder: ReportFolder, folders: Sequence[Path], store: Store | None, beside: Mapping[str, str] | None
) -> dict[str, Any]:
    """Write data, pictures, scripts and library of the page of graphs into a folder; what the page must know first."""
    entries: list[dict[str, Any]] = []
    names: set[str] = set()
    every = [_facts(path) for path in folders]
    for path, facts in zip(folders, every, strict=True):
        _refuse_other_store(path, facts, store)
    dictionaries, called = _dictionary_names(every, beside), Counter(map(graph_name, every))
    images: set[int] = set()
    standing: dict[str, dict[str, list[int]]] = {}
    for path in folders:
        graph = Graph.read(path)
        _refuse_other_store(path, graph.facts, store)
        name = graph_name(graph.facts)
        name = _free_name(f"{name}.{_place(path)}" if called[name] > 1 else name, names)
        names.add(name)
        aggregated = Graph.read(path / "aggregated") if (path / "aggregated" / "facts.json").is_file() else None
        entry = {"name": name, **_entry(graph.facts, dictionaries)}
        views = {
            "positional": view_columns(graph),
            "aggregated": None if aggregated is None else view_columns(aggregated),
        }
        folder.script(f"graphs/{name}", {"facts": graph.facts, "pieces": _pieces(store, graph.facts), "views": views})
        for site, feature in sorted(features_of(graph if aggregated is None else aggregated)):
            if (entry["dictionaries"].get(site) or {}).get("in_report"):
                standing.setdefault(entry["dictionaries"][site]["name"], {}).setdefault(str(feature), []).append(
                    len(entries)
                )
        entries.append({**entry, "over_tokens": aggregated is not None})
        images.add(int(graph.facts["image"]))
    there = store is not None and store.meta.pictures != "none"
    same = write_pictures(folder, store, images, SIDE) if there and store is not None else {}
    contents = {
        "graphs": entries,
        "pictures": {
            "there": there,
            "without": "the page was made without the store" if store is None else "the store keeps no pictures",
            "folder_images": FOLDER_IMAGES,
            "same": {str(k): v for k, v in same.items()},
        },
        "in_report": beside is not None,
    }
    folder.script("graphs", contents)
    if beside is not None:
        folder.script("graph_features", {"graphs": entries, "standing": standing})
    write_scripts(folder)
    return contents


def write_scripts(folder: ReportFolder) -> None:
    """Write what is the page's own: styles, scripts, the library with its licences."""
    folder.write("graph.css", _ours("templates", "graph.css"))
    for name in SCRIPTS:
        folder.write(f"static/{name}", _ours("templates", "static", name))
    modules = [_ours("libraries", f"d3-{name}.min.js").rstrip() for name in LIBRARIES]
    folder.write("libraries/d3.js", b"\n".join(modules) + b"\n")
    folder.write("libraries/LICENSE-d3.txt", _ours("libraries", "LICENSE-d3.txt"))


def rendered(base: str, in_report: bool, contents: Mapping[str, Any], steering: bool = False) -> bytes:
    """The page itself; `base`: where what it loads lies, from it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analyze.circuits.viewer", "templates"),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    values = {
        "base": base,
        "in_report": in_report,
        "steering": steering,
        "scripts": REPORT_SCRIPTS + SCRIPTS,
        "many": len(contents["graphs"]) > 1,
    }
    return environment.get_template("graph.html").render(values).encode()


def graph_name(facts: Mapping[str, Any]) -> str:
    """What a graph is called, from what it is of: `image-00017.step-2.img_3.p12.f66`, or what its supernode is called at the end."""
    targets = facts.get("targets") or [{}]
    parts = [f"image-{int(facts['image']):05d}", f"step-{facts['step']}"]
    if len(targets) > 1:
        parts.append("together")
    elif targets[0].get("feature") is not None:
        parts += [str(targets[0]["site"]), f"p{targets[0]['token']}", f"f{targets[0]['feature']}"]
    else:
        name = str(targets[0].get("name") or "graph").removeprefix("supernode_")
        parts.append(_plain(name))
    return ".".join(parts)


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def _place(folder: Path) -> str:
    """The folder that `analyze graph --out` made for a graph, as part of a name."""
    out = folder.resolve()
    return _plain((out.parent.parent if out.parent.name == "graphs" else out).name)


def features_of(graph: Graph) -> set[tuple[str, int]]:
    """The features that stand in a graph: site and number."""
    own = graph.nodes.filter(pc.equal(graph.nodes["kind"], "feature"))
    columns = (own[name].to_pylist() for name in ("stream", "layer", "feature"))
    return {(f"{stream}_{layer}", feature) for stream, layer, feature in zip(*columns, strict=True)}


def _free_name(name: str, taken: Collection[str]) -> str:
    """A graph's name that no other has: `name`, else `name-2`, `name-3` and so on."""
    found, number = name, 1
    while found.lower() in {each.lower() for each in taken}:  # some file systems know no capitals
        number += 1
        found = f"{name}-{number}"
    return found


@dataclass(frozen=True)
class _Named:
    """What a dictionary is called on the page, and whether a report beside it shows its features."""

    name: str
    in_report: bool


def _dictionary_names(facts: Iterable[Mapping[str, Any]], beside: Mapping[str, str] | None) -> dict[str, _Named]:
    """Identity -> name, each name once: dictionaries of one name and different weights get the beginning of their identity."""
    full = {
        str(of.get("identity")): str(of.get("name") or site)
        for each in facts
        for site, of in (each.get("transcoders") or {}).items()
    }
    known = beside or {}
    counts = Counter([*known.values(), *(name for identity, name in full.items() if identity not in known)])
    return {
        identity: _Named(known[identity], True)
        if identity in known
        else _Named(f"{name}-{identity.removeprefix('sha256-')[:8]}" if counts[name] > 1 else name, False)
        for identity, name in full.items()
    }


def _entry(facts: Mapping[str, Any], names: Mapping[str, _Named]) -> dict[str, Any]:
    """What the list of graphs says of one; `names`: of all dictionaries by identity."""
    dictionaries = {}
    for site, of in (facts.get("transcoders") or {}).items():
        identity = str(of.get("identity"))
        dictionaries[site] = {
            "name": names[identity].name,
            "full_name": str(of.get("name") or site),
            "identity": identity,
            "in_report": names[identity].in_report,
        }
    keys = ("image", "prompt", "step", "targets", "grid", "n_txt")
    return {**{key: facts.get(key) for key in keys}, "dictionaries": dictionaries}


def _pieces(store: Store | None, facts: Mapping[str, Any]) -> list[str]:
    """The text tokens of the traced prompt as people read them; empty where they are not known."""
    if store is None or "text_pieces" not in store.prompts().column_names:
        return []
    return [readable(piece) for piece in store.prompts()["text_pieces"][int(facts["image"])].as_py() or []]


def _facts(folder: Path) -> dict[str, Any]:
    """What a graph is of, without its tables."""
    found = read_json(folder / "facts.json")
    if not isinstance(found, dict):
        raise ForeignError(
            f"{folder / 'facts.json'} is not the record of a graph: make it with python -m analyze graph"
        )
    return found


def _refuse_other_store(path: Path, facts: Mapping[str, Any], store: Store | None) -> None:
    for key in ("image", "step", "grid"):
        if facts.get(key) is None:
            raise ForeignError(
                f"{path / 'facts.json'} does not say its {key}: make the graph again with python -m analyze graph"
            )
    if store is not None and facts.get("store") not in (None, store.id):
        raise MismatchError(
            f"the graph in {path} is of store {str(facts['store'])[:23]}…, not of {store.id[:23]}…: analyze the store that the "
            "graphs are of, or make the graphs from this one"
        )


def _ours(*path: str) -> bytes:
    return resources.files("analyze.circuits.viewer").joinpath(*path).read_bytes()
