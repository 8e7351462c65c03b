"""What came out of `graph`: a row an experiment, then those of the other graphs in OUT, as Parquet; this run's for a terminal.

Rows are read from the graphs on the disk, so that those of an earlier run and those of this one are told alike.  The columns of a
CSV of targets are carried; one that is called as a column here gets `csv_` before its name.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analyze.circuits.checks import check_table
from analyze.circuits.experiments import Made
from analyze.circuits.folders import dictionaries_of, facts_of, graph_folders
from analyze.circuits.graph import Graph
from analyze.circuits.inquiry import Inquiry, further_subjects
from analyze.circuits.viewer.pages import graph_name
from analyze.labels.book import LabelBook
from analyze.prompts import prompt_text
from store.sites import Site
from store.sizes import many

LEAVES = ("img", "txt", "error", "bias", "rest", "dropped")
SHARES = {"direct": ("features", *LEAVES), "paths": LEAVES}
"""of the edges into the target, and of what flows into it along all paths"""
SUMMARY = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("image", pa.int64(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("target", pa.string(), nullable=False),  # as flags write it
        ("site", pa.string()),  # null of supernodes and of graphs of several targets
        ("token", pa.int32()),
        ("feature", pa.int32()),
        ("label", pa.string()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("sigma", pa.float64()),
        ("activation", pa.float64()),
        ("pre", pa.float64()),  # of several targets their sum
        # parts of the target's pre-activation, which add up to 1: of the edges into it, and along all paths
        *((f"{way}_{kind}", pa.float64()) for way, kinds in SHARES.items() for kind in kinds),
        ("excites", pa.string()),  # the strongest features, with what they add along all paths
        ("suppresses", pa.string()),
        ("nodes", pa.int64()),
        ("edges", pa.int64()),
        ("expanded", pa.int64()),
        ("pruned_nodes", pa.int64()),
        ("pruned_edges", pa.int64()),
        ("conservation", pa.float64()),
        ("replay_error", pa.float64()),
        ("reason", pa.string()),  # why there is no graph; null where there is one
    ]
)
NAMED = 3
"""strongest sources that are named"""
SHOWN = 30
"""rows in a terminal"""


class Labels:
    """The labels of features, of this run's transcoders and of those that graphs of earlier runs in OUT were made with."""

    def __init__(self, inquiry: Inquiry) -> None:
        subjects, kept = dict(inquiry.subjects), {}
        for folder in graph_folders(inquiry.settings.out):
            for name, identity in dictionaries_of(folder).items():
                kept[Site.parse(name)] = identity
        if others := {site: identity for site, identity in kept.items() if site not in subjects}:
            subjects |= further_subjects(inquiry.settings, others)
        self._books = {site: LabelBook.of(subject) for site, subject in sorted(subjects.items())}
        self.by_identity = {subject.identity: self._books[site] for site, subject in subjects.items()}
        """each dictionary's book"""

    def text(self, site: Site, feature: int) -> str | None:
        """How a feature was labelled; None when it was not."""
        book = self._books.get(site)
        return None if book is None else book.text(feature)

    @property
    def books(self) -> dict[str, LabelBook]:
        """Every book by its site, `img_3`."""
        return {str(site): book for site, book in self._books.items()}


def row_of(made: Made, labels: Labels, inquiry: Inquiry) -> dict[str, Any]:
    """What is said of one experiment: the columns of `SUMMARY`, then those of its CSV."""
    experiment = made.experiment
    carried = _carried(experiment.columns)
    if made.folder is not None:
        return _of_graph(made.name, made.folder, labels) | carried
    row: dict[str, Any] = dict.fromkeys(SUMMARY.names) | {
        "name": made.name, "image": experiment.image, "step": experiment.step,
        "target": " and ".join(map(str, experiment.wanted)), "reason": made.reason,
    }  # fmt: skip
    asks, store = list(experiment.asks), inquiry.store
    if len(asks) == 1 and experiment.wanted[0].name is None:
        row |= {"site": str(asks[0].site), "token": asks[0].token, "feature": asks[0].feature}
        row["label"] = labels.text(asks[0].site, asks[0].feature)
    if experiment.image < store.n_images:
        sigmas = store.prompts()["sigma"][experiment.image].as_py()
        row |= {
            "prompt": prompt_text(store, experiment.image),
            "seed": store.prompts()["seed"][experiment.image].as_py(),
        }
        row["sigma"] = float(sigmas[experiment.step]) if experiment.step < len(sigmas) else None
    return row | carried


def rows_of_others(folders: Sequence[Path], labels: Labels, before: Path) -> list[dict[str, Any]]:
    """What is said of graphs that other runs made; the columns of their CSV are taken from the summary `before`."""
    known: dict[str, dict[str, Any]] = {}
    if folders and before.is_file():
        try:
            known = {row["name"]: row for row in pq.read_table(before).to_pylist()}
        except (OSError, KeyError, pa.ArrowException):
            known = {}  # it is written anew
    rows = []
    for folder in folders:
        name = folder.name if folder.parent.name == "graphs" else graph_name(facts_of(folder))
        carried = {column: text for column, text in known.get(name, {}).items() if column not in SUMMARY.names}
        rows.append(_of_graph(name, folder, labels) | carried)
    return rows


def _carried(columns: Mapping[str, str]) -> dict[str, str]:
    """The columns of a CSV, with `csv_` before those that a summary has itself."""
    found: dict[str, str] = {}
    for name, text in columns.items():
        own = name
        while own in SUMMARY.names or (own != name and own in columns):
            own = f"csv_{own}"
        found[own] = text
    return found


def _of_graph(name: str, folder: Path, labels: Labels) -> dict[str, Any]:
    """What is said of a finished graph."""
    aggregated = Graph.read(folder / "aggregated")
    facts, totals = aggregated.facts, aggregated.facts["totals"]
    targets = facts["targets"]
    row = dict.fromkeys(SUMMARY.names) | {
        "name": name, "image": facts["image"], "step": facts["step"], "prompt": facts["prompt"],
        "target": " and ".join(facts["asked"]), "seed": facts["seed"], "sigma": facts["sigma"],
        "pre": sum(target["pre"] for target in targets),
        "excites": _strongest(aggregated, labels, 1), "suppresses": _strongest(aggregated, labels, -1),
        "replay_error": max(totals["replay_error"].values(), default=None),
        **{key: totals.get(key) for key in ("nodes", "edges", "expanded", "pruned_nodes", "pruned_edges", "conservation")},
        **{f"{way}_{kind}": totals["shares"][way][kind] for way, kinds in SHARES.items() for kind in kinds},
    }  # fmt: skip
    if len(targets) == 1:
        row |= {key: targets[0].get(key) for key in ("activation", "site", "token", "feature")}
        if row["site"] is not None:
            row["label"] = labels.text(Site.parse(str(row["site"])), int(targets[0]["feature"]))
    return row


def _strongest(graph: Graph, labels: Labels, sign: int) -> str | None:
    """The features that excite (sign 1) or suppress (-1) the targets most along all paths: `feature_L2_img_f5 "red" +0.81, …`."""
    nodes = graph.nodes.select(["name", "kind", "layer", "stream", "feature", "effect", "target"]).to_pylist()
    told = [node for node in nodes if not node["target"] and node["kind"] == "feature"]
    effects = np.asarray([node["effect"] or 0.0 for node in told]) * sign
    order = np.argsort(-effects, kind="stable")[:NAMED]
    return ", ".join(_told(told[row], labels) for row in order if effects[row] > 0) or None


def _told(node: Mapping[str, Any], labels: Labels) -> str:
    label = labels.text(Site("double", node["layer"], node["stream"]), node["feature"])
    said = f' "{label}"' if label else ""
    return f"{node['name']}{said} {node['effect']:+.3g}"


def summary_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The rows as a table: the columns of `SUMMARY`, then every further column of the CSV as text."""
    more = list(dict.fromkeys(name for row in rows for name in row if name not in SUMMARY.names))
    schema = pa.schema([*SUMMARY, *(pa.field(name, pa.string()) for name in more)])
    return pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema)


def printed(made: Sequence[Made], rows: Sequence[Mapping[str, Any]]) -> str:
    """What a terminal shows: of one graph what it says, of several a table."""
    lines = [_one(rows[0])] if len(rows) == 1 else [_table(rows)]
    checks = [(each.name, each.check) for each in made if each.check is not None]
    if checks:
        lines.append(check_table(checks))
    return "\n".join(lines)


def _one(row: Mapping[str, Any]) -> str:
    """A graph in words."""
    if row["reason"] is not None:
        return f"  {row['target']}: no graph: {row['reason']}"
    named = row["target"] + (f' "{row["label"]}"' if row["label"] else "")
    lines = [f'  {named} in image {row["image"]} at step {row["step"]}, sigma {row["sigma"]:.3g}: "{row["prompt"]}"']
    if row["pre"] is not None:
        what = "pre-activations together" if " and " in row["target"] else "pre-activation"
        lines.append(f"  {what} {row['pre']:.4g} = {_parts(row, 'direct')}")
        lines.append(f"  along all paths {_parts(row, 'paths')}")
    lines.append(f"  of the expanded features, excited most by     {row['excites'] or 'none'}")
    lines.append(f"                            suppressed most by  {row['suppresses'] or 'none'}")
    lines.append(
        f"  {many(row['nodes'], 'node')}, {row['expanded']:,} expanded, and {many(row['edges'], 'edge')}; over tokens and pruned "
        f"{many(row['pruned_nodes'], 'node')} and {many(row['pruned_edges'], 'edge')}"
    )
    lines.append(f"  conservation {row['conservation']:.1e}, replay of the trace {row['replay_error']:.1e}")
    return "\n".join(lines)


WORDS = {
    "img": "image", "txt": "text", "features": "features", "error": "error", "bias": "constants", "rest": "not expanded",
    "dropped": "under the thresholds",
}  # fmt: skip


def _parts(row: Mapping[str, Any], way: str) -> str:
    """`image 41 % + text 22 % + …`, the largest first."""
    parts = sorted(((row[f"{way}_{kind}"], WORDS[kind]) for kind in SHARES[way]), key=lambda part: -abs(part[0]))
    return " + ".join(f"{word} {share:.0%}" for share, word in parts if abs(share) >= 0.005).replace("+ -", "- ")


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line an experiment, at most `SHOWN`."""
    shown = rows[:SHOWN]
    targets = [_cut(row["target"] + (f" · {row['label']}" if row["label"] else ""), 40) for row in shown]
    width = max(len("target"), *map(len, targets))
    heads = ("image", "text", "error", "const", "rest", "dropped")
    names = ("img", "txt", "error", "bias", "rest", "dropped")
    lines = [
        f"  {'image':>5} {'step':>4}  {'target':<{width}} {'pre':>8} "
        + " ".join(f"{head:>7}" for head in heads)
        + "  excited most by (of expanded features)"
    ]
    for row, target in zip(shown, targets, strict=True):
        start = f"  {row['image']:>5} {row['step']:>4}  {target:<{width}} "
        if row["reason"] is not None:
            lines.append(f"{start}{'–':>8}  no graph: {row['reason']}")
            continue
        figures = " ".join(f"{row[f'paths_{name}']:>7.0%}" for name in names)
        pre = "" if row["pre"] is None else f"{row['pre']:.4g}"
        lines.append(f"{start}{pre:>8} {figures}  {_cut((row['excites'] or '–').split(', ')[0], 44)}")
    if len(rows) > SHOWN:
        lines.append(f"  … and {len(rows) - SHOWN:,} more in summary.parquet")
    return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
