"""The figures of a validation in words: a table for the terminal and a page of Markdown."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from analyze.validation.agreement import POOLED
from analyze.validation.settings import KINDS

MEANING = {
    "direct": "edges: attribution against the change of the target, MLP outputs held",
    "total": "pairs: effect along all paths against the change of the target, everything live",
    "pairwise": "sources of the explained targets: influence against |change|, everything live",
    "pairwise-all": "all pairs of nodes: influence against |change|, everything live",
}
COLUMNS = (
    "test",
    "of",
    "graphs",
    "n",
    "Spearman",
    "mean over graphs (least to most)",
    "Pearson",
    "|.|",
    "slope",
    "same sign",
    "rival",
)
LIMITS = """\
What each test can show, and what it cannot:

- **direct** holds the MLPs, so it tests the linear path that an edge stands for. The graph freezes attention patterns and the
  denominators of the norms; the model does not, and that is the whole difference: with both frozen in the model too, measured and
  predicted are equal to rounding. It is of first order in the perturbation, so a smaller `--eps` does not make it vanish. A slope
  under 1 says that edges promise too much: what a source writes along the residual itself lengthens it, and a live norm takes that
  out again. The test says nothing of whether features are what the MLPs compute with.
- **Errors and rests** (with `--sources feature,error,rest`) agree much less than features, and figures of features alone say nothing of
  them. On tiny-flux the largest edges that fail come from rests at text tokens of the first two blocks: measured they are near nothing,
  often of the other sign. With patterns and norms frozen in the model these edges are exact too, so it is patterns and norms that answer.
- **total** lets everything answer. Beside patterns and norms, graph and model differ here by how well transcoders stand in for MLPs,
  by selections (TopK, thresholds) that change, and by paths through what the graph did not expand.
- **pairwise** compares influence, a share without sign in which paths of opposite sign do not cancel, with the size of the change,
  where they do. Only ranks mean something.
- *rival* is the Spearman correlation of the size of the change with the length of what was taken away, which knows nothing of a graph.
- *|.|* is the Spearman correlation of sizes alone, without signs.
- *to same token, other token, other stream*: where the target stands, seen from the source. Only the same token is reached by the
  residual stream alone; all others through attention.
- One node is perturbed at a time: nothing is said of what several do together, and pairs of one graph are not independent.
"""


def rows_text(table: pa.Table) -> str:
    """The rows of all graphs together, and of each kind of source where there are several, aligned for a terminal."""
    shown = [COLUMNS, *(_cells(row) for row in table.to_pylist() if row["of"] in (POOLED, *(f"{k}s" for k in KINDS)))]
    widths = [max(len(row[place]) for row in shown) for place in range(len(shown[0]))]
    lines = [[*map(str.ljust, row[:2], widths[:2]), *map(str.rjust, row[2:], widths[2:])] for row in shown]
    return "\n".join("  " + "  ".join(line) for line in lines)


def page(table: pa.Table, facts: Mapping[str, Any]) -> str:
    """The page: what was run, the figures of all graphs, of kinds of source, of each graph, and what they can show."""
    rows = table.to_pylist()
    together = [row for row in rows if row["mean"] is not None or row["of"] == POOLED]
    names = {graph["name"] for graph in facts["graphs"]}
    parts = [row for row in rows if row["of"] not in names and row["of"] != POOLED]
    each = [row for row in rows if row["of"] in names]
    said = [
        "# Perturbation validation of attribution graphs",
        _about(facts),
        *(f"- **{test}** {MEANING[test]}" for test in dict.fromkeys(row["test"] for row in rows)),
        "",
        _markdown(together),
    ]
    if parts:
        said += ["", "## By what was perturbed", "", _markdown(parts)]
    said += ["", "## Graph by graph", "", _graphs(facts), "", _markdown(each), "", LIMITS]
    return "\n".join(said)


def _about(facts: Mapping[str, Any]) -> str:
    settings = facts["settings"]
    lines = [
        "",
        f"Model {facts['model']}, perturbed in {settings['dtype']}; store {facts['store'][:23]}…; {len(facts['graphs'])} graphs; eps "
        f"{settings['eps']:g}; perturbed: {', '.join(settings['sources'])}.",
        "",
        f"Redrawn pre-activations differ from the graphs' by {facts['drift']:.1e} at most (of each graph the median node); a reader that a "
        f"source cannot reach changes by {facts['out_of_reach']:.1e} at most.",
    ]
    if facts["exactness"] is not None:
        lines += [
            "",
            "With transcoders in the place of the MLPs and their errors added back the model's answer differs by at most "
            f"{facts['exactness']:.1e} of its largest value.",
        ]
    return "\n".join([*lines, ""])


def _graphs(facts: Mapping[str, Any]) -> str:
    lines = [
        "| graph | prompt | image | step | sigma | targets | perturbed | read |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {graph['name']} | {_escaped(graph['prompt'])} | {graph['image']} | {graph['step']} | {graph['sigma']:.4g} | "
        f"{', '.join(graph['targets'])} | {graph['perturbed']} | {graph['read']} |"
        for graph in facts["graphs"]
    ]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(name.replace("|", "\\|") for name in COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    return "\n".join(lines + ["| " + " | ".join(_cells(row)) + " |" for row in rows])


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    spread = "–" if row["mean"] is None else f"{row['mean']:.3f} ({row['least']:.3f} to {row['most']:.3f})"
    return (
        row["test"], row["of"], str(row["graphs"]), f"{row['n']:,}", _number(row["spearman"]), spread, _number(row["pearson"]),
        _number(row["magnitudes"]), _number(row["slope"]),
        "–" if row["same_sign"] is None else f"{row['same_sign']:.0%}", _number(row["rival"]),
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
