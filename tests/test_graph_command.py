"""`analyze graph` on traces of tiny-flux: what it makes, that it goes on where it stopped, that it checks itself, that FLUX is not run."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from analyze.circuits import checks, experiments
from analyze.circuits.command import GraphsMade, run
from analyze.circuits.folders import write_graph
from analyze.circuits.frozen import perturbed
from analyze.circuits.graph import NODES, Graph
from analyze.circuits.inquiry import open_inquiry
from analyze.circuits.settings import GraphSettings
from analyze.circuits.summary import Labels, rows_of_others
from analyze.circuits.targets import Ask
from analyze.circuits.trace import stored_trace
from analyze.labels.book import LabelBook
from store import Site, Store, open_store
from store.errors import DamagedError, ForeignError, GranaryError
from tests.object_server import tree
from train.dictionaries.collection import load_dictionaries

ROOT = Path(__file__).parent.parent
TARGETS = "image,step,site,token,feature,score,group\n"


@pytest.fixture
def graph(traced_flux: Path, tmp_path: Path) -> Callable[..., GraphsMade]:
    """Runs the command on the traced store: `graph("g", target=("img_2:max:3",))` into tmp_path/g."""

    def make(out: str = "g", **options: Any) -> GraphsMade:
        usual: dict[str, Any] = {"nodes": 6, "batch": 3, "page": False}
        if "targets" not in options:
            usual |= {"image": 1, "step": 3}
        places: dict[str, Any] = {"store": traced_flux / "store", "dictionaries": traced_flux / "dictionaries"}
        return run(GraphSettings(**{**places, "out": tmp_path / out, **usual, **options}))

    return make


def features(made: GraphsMade) -> list[str]:
    """The names of the folders of all graphs."""
    return [each.folder.name for each in made.made if each.folder is not None]


def test_one_target_makes_one_graph_in_all_its_forms(
    graph: Callable[..., GraphsMade], traced_flux: Path, tmp_path: Path
) -> None:
    graph(target=("img_2:max:3",))
    whole, over_tokens = Graph.read(tmp_path / "g"), Graph.read(tmp_path / "g" / "aggregated")
    store, facts = open_store(traced_flux / "store"), whole.facts
    assert (facts["store"], facts["image"], facts["step"]) == (store.id, 1, 3)
    assert facts["prompt"] == store.prompts()["prompt"][1].as_py()
    assert facts["grid"][0] * facts["grid"][1] == facts["n_img"]
    assert sorted(facts["transcoders"]) == ["img_0", "img_1", "img_2", "txt_0", "txt_1"]
    (target,) = [
        name for name, is_target in zip(whole.names, whole.nodes["target"].to_pylist(), strict=True) if is_target
    ]
    assert target == f"feature_L2_img_p{facts['targets'][0]['token']}_f3"
    assert facts["totals"]["expanded"] == 6
    positional = json.loads((tmp_path / "g" / "positional.json").read_text())["edges"]
    assert [(e["source"], e["target"], e["attribution"]) for e in positional] == [
        (whole.names[s], whole.names[t], a)
        for s, t, a in zip(whole.sources, whole.targets, whole.attributions, strict=True)
    ]
    said = json.loads((tmp_path / "g" / "graph.json").read_text())
    assert said["version"] == 2
    weights = load_dictionaries(traced_flux / "dictionaries", [Site.parse("img_2")])[0]
    assert said["target"]["encoder_bias"] == pytest.approx(float(weights.encoder.bias[3]))
    pruning = said["metadata"]["pruning"]
    assert pruning["original_num_nodes"] >= pruning["pruned_num_nodes"] > 0
    assert pruning["original_num_edges"] > pruning["pruned_num_edges"] > 0
    assert {type(pruning[f"{when}_attribution_sum"]) for when in ("original", "pruned")} == {float}
    assert {node["id"] for node in said["nodes"]} <= {name.replace("rest_", "error_") for name in over_tokens.names}


def test_edges_into_every_expanded_node_add_up_to_its_preactivation(
    graph: Callable[..., GraphsMade], tmp_path: Path
) -> None:
    graph(target=("txt_2:max:7",), dtype="float64")
    found = Graph.read(tmp_path / "g")
    pre = found.nodes["pre"].to_numpy(zero_copy_only=False).astype(float)
    expanded = np.flatnonzero(np.isfinite(pre))
    sums = np.bincount(found.targets, found.attributions, len(found.nodes))
    assert len(expanded) == 6
    assert np.abs(sums - pre)[expanded].max() <= 1e-10 * np.abs(found.attributions).max()


def test_max_is_the_token_where_the_feature_is_most_active(graph: Callable[..., GraphsMade], tmp_path: Path) -> None:
    made = graph(target=("img_2:max:3",))
    token, activation = (made.summary[name][0].as_py() for name in ("token", "activation"))
    others = graph("o", image=1, step=3, target=tuple(f"img_2:{t}:3" for t in range(0, 64, 9)), skip_inactive=True)
    found = others.summary["activation"].to_pylist()
    assert activation >= max(value for value in found if value is not None)
    again = graph("h", target=(f"img_2:{token}:3",))
    assert again.summary["activation"][0].as_py() == activation
    assert tree(tmp_path / "g") == tree(tmp_path / "h")


def test_each_of_several_targets_images_and_steps_has_a_graph(graph: Callable[..., GraphsMade], tmp_path: Path) -> None:
    made = graph(image="0-1", step="all", target=("img_2:max:3",), supernode=("two=img_2:max:3+0.5*img_1:max:3",))
    assert len(made.made) == len(features(made)) == 8
    assert "image-00001.step-3.two" in features(made)
    table = pq.read_table(tmp_path / "g" / "summary.parquet")
    assert table.equals(made.summary)
    assert table["name"].to_pylist() == [each.name for each in made.made]
    sums = sum(table[f"paths_{kind}"].to_numpy() for kind in ("img", "txt", "error", "bias", "rest", "dropped"))
    assert np.abs(sums - 1).max() < 1e-4


def test_targets_asked_for_together_share_a_graph(
    graph: Callable[..., GraphsMade], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph(target=("img_2:max:3", "txt_2:max:7"), together=True)
    found = Graph.read(tmp_path / "g")
    assert sum(found.nodes["target"].to_pylist()) == 2
    said = capsys.readouterr().out
    assert "pre-activations together" in said
    assert "along all paths" in said
    assert all(isinstance(target["encoder_bias"], float) for target in found.facts["targets"])


def write_csv(path: Path, *rows: str, header: str = TARGETS) -> Path:
    path.write_text(header + "".join(f"{row}\n" for row in rows))
    return path


def test_a_csv_makes_a_graph_of_each_row_and_group_and_its_columns_are_carried(
    graph: Callable[..., GraphsMade], tmp_path: Path
) -> None:
    path = write_csv(
        tmp_path / "t.csv", "1,3,img_2,max,3,0.5,", "0,1,img_1,max,3,0.25,pair", "0,1,img_2,max,3,0.75,pair"
    )
    made = graph(targets=path)
    assert made.summary["name"].to_pylist()[0] == "image-00000.step-1.pair"
    assert made.summary["score"].to_pylist() == ["0.25", "0.5"]
    clash = write_csv(
        tmp_path / "c.csv", "1,3,img_2,max,3,p,q", header="image,step,site,token,feature,prompt,csv_prompt\n"
    )
    said = graph("c", targets=clash).summary.to_pylist()[0]
    assert said["prompt"] != "p"
    assert (said["csv_csv_prompt"], said["csv_prompt"]) == ("p", "q"), "no column is lost"


def test_summary_page_and_what_is_gathered_hold_all_graphs_of_out_whichever_run_made_them(
    graph: Callable[..., GraphsMade], traced_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(traced_flux / "dictionaries", tmp_path / "dictionaries")
    graph = partial(graph, dictionaries=tmp_path / "dictionaries")
    first = write_csv(tmp_path / "a.csv", "1,3,img_2,max,3,0.5,")
    graph(targets=first, page=True)
    book = LabelBook.of(tmp_path / "dictionaries" / "transcoder_img_2")
    book.set(3, "round", "Ada", datetime(2026, 1, 1, tzinfo=UTC))
    book.save()
    made = graph(targets=write_csv(tmp_path / "b.csv", "0,1,img_1,max,3,0.25,"), page=True)
    assert len(made.made) == 1
    assert made.summary["label"].to_pylist() == [None, "round"], "of a site above those that this run needs"
    assert "round" in (tmp_path / "g" / "page" / "data" / "labels.js").read_text()
    assert [(row["image"], row["score"]) for row in made.summary.to_pylist()] == [(0, "0.25"), (1, "0.5")]
    assert [len(list((tmp_path / "g" / place).glob("*"))) for place in ("graphs", "page/data/graphs")] == [2, 2]
    assert "g holds 2 in all -> " in capsys.readouterr().out
    graph(targets=write_csv(tmp_path / "c.csv", "0,3,img_1,max,3,0.25,"))
    assert not (tmp_path / "g" / "index.html").exists(), "it would lack the new graph"
    assert capsys.readouterr().out.rstrip().endswith("/g")


def test_one_damaged_graph_is_told_and_left_out_and_keeps_no_other_from_being_made(
    graph: Callable[..., GraphsMade], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_csv(tmp_path / "a.csv", "1,3,img_2,max,3,0.5,")
    name = graph(targets=first, page=True).summary["name"][0].as_py()
    folder = tmp_path / "g" / "graphs" / name
    whole = tree(folder)
    for file in ("edges.parquet", "aggregated/nodes.parquet"):
        damaged = folder / file
        before = damaged.read_bytes()
        damaged.write_bytes(before[:-9])
        capsys.readouterr()
        made = graph(targets=write_csv(tmp_path / "b.csv", "0,1,img_1,max,3,0.25,"), page=True)
        assert made.made[0].folder is not None and made.summary.num_rows == 1
        said = capsys.readouterr().out
        assert "lack a graph" in said and f"remove {folder} and run the same command" in said
        assert name not in (tmp_path / "g" / "page" / "data" / "graphs.js").read_text()
        damaged.write_bytes(before)
    (folder / "aggregated" / "facts.json").unlink()
    assert graph(targets=first, page=True).made[0].new, "a graph without its record over tokens is made again"
    assert tree(folder) == whole
    (folder / "facts.json").write_text("{")
    with pytest.raises(DamagedError, match=f"remove {folder} and run the same command"):
        graph(targets=first)


def test_what_out_says_of_itself_is_no_record_of_graphs(graph: Callable[..., GraphsMade], tmp_path: Path) -> None:
    graph(target=("img_2:max:3",))
    record = json.loads((tmp_path / "g" / "run.json").read_text())
    for wrong in ([], {**record, "settings": None}, {**record, "format": "other"}):
        (tmp_path / "g" / "run.json").write_text(json.dumps(wrong))
        with pytest.raises(ForeignError, match="choose another --out"):
            graph(target=("img_2:max:3",))
    (tmp_path / "g" / "run.json").write_text(json.dumps(record))
    (tmp_path / "g" / "facts.json").write_text("[]")
    with pytest.raises(ForeignError, match="is not the record of a graph"):
        graph(target=("img_2:max:3",))


def test_the_one_graph_in_out_itself_is_named_for_what_it_is_of(
    graph: Callable[..., GraphsMade], traced_flux: Path, tmp_path: Path
) -> None:
    made = graph(target=("img_2:max:3",))
    places: dict[str, Any] = {"store": traced_flux / "store", "dictionaries": traced_flux / "dictionaries"}
    asked = GraphSettings(**places, out=tmp_path / "g", image=1, step=3, target=("img_2:max:3",))
    labels = Labels(open_inquiry(asked))
    (row,) = rows_of_others([tmp_path / "g"], labels, tmp_path / "g" / "summary.parquet")
    assert row["name"] == made.summary["name"][0].as_py()


def test_max_in_the_text_is_a_real_token_unless_padding_counts(traced_flux: Path, tmp_path: Path) -> None:
    differs = 0
    for padding in (False, True):
        settings = GraphSettings(
            store=traced_flux / "store", dictionaries=traced_flux / "dictionaries", out=tmp_path / "g", image=1, step=3,
            target=("txt_2:max:3",), padding=padding,
        )  # fmt: skip
        inquiry = open_inquiry(settings)
        length = inquiry.store.prompts()["text_length"][1].as_py()
        model = experiments.LazyModel(inquiry, 1, 3, inquiry.experiments)
        active = model().active(Site.parse("txt_2"))
        for feature in range(96):
            mine = (active.feature == feature) & ((active.token < length) | padding)
            best = active.token[mine][active.z[mine].argmax()] if mine.any() else None
            assert model.most_active(Ask(Site.parse("txt_2"), None, feature)) == best
            differs += padding and best is not None and best >= length
    assert differs, "some feature is most active at padding"


def test_a_run_goes_on_with_as_many_threads_as_it_began_with(
    graph: Callable[..., GraphsMade], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph(target=("img_2:max:3",))
    record = tmp_path / "g" / "run.json"
    said = json.loads(record.read_text())
    now = torch.get_num_threads()
    assert (said["settings"]["threads"], said["settings"]["device"]) == (now, "cpu")
    said["settings"]["threads"] = now + 1
    record.write_text(json.dumps(said))
    graph(target=("img_2:max:3",))
    assert f"computing with {now + 1} threads" in capsys.readouterr().out
    assert torch.get_num_threads() == now
    assert json.loads(record.read_text())["settings"]["threads"] == now + 1


def test_one_trace_read_feeds_all_its_targets(
    graph: Callable[..., GraphsMade], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[int, int]] = []

    def noting(store: Store, image: int, step: int) -> Any:
        opened.append((image, step))
        return stored_trace(store, image, step)

    monkeypatch.setattr(experiments, "stored_trace", noting)
    graph(image="0-1", step=3, target=("img_2:max:3", "img_2:max:8", "txt_1:max:3"))
    assert opened == [(0, 3), (1, 3)]


@pytest.mark.parametrize(
    ("images", "kept"),
    [("0", [False, True]), pytest.param("0-1", [False, False, True, True], marks=pytest.mark.slow)],
)
def test_a_run_that_was_interrupted_goes_on_and_ends_with_the_same_bytes(
    images: str, kept: list[bool], graph: Callable[..., GraphsMade], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "image": images,
        "step": "1,3" if images == "0" else 3,
        "target": ("img_2:max:3", "txt_2:max:7")[: len(kept) // 2],
    }
    graph("whole", **options)
    left = [len(kept) // 2 + 1]

    def dying(*given: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        write_graph(*given)

    monkeypatch.setattr(experiments, "write_graph", dying)
    with pytest.raises(KeyboardInterrupt):
        graph("g", **options)
    monkeypatch.undo()
    made = graph("g", **options)
    assert [each.new for each in made.made] == kept
    assert tree(tmp_path / "g") == tree(tmp_path / "whole")


def test_a_run_that_is_repeated_reads_no_trace(
    graph: Callable[..., GraphsMade], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = graph(target=("img_2:max:3",)).summary["token"][0].as_py()
    before = tree(tmp_path / "g")
    monkeypatch.setattr(experiments, "stored_trace", lambda *given: pytest.fail("a trace was read"))
    made = graph(target=(f"img_2:{token}:3",))
    assert not made.made[0].new
    assert tree(tmp_path / "g") == before


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_checks_pass_on_a_trace_of_the_model(
    graph: Callable[..., GraphsMade], dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = graph(target=("img_2:max:3",), check=True, dtype=dtype)
    check = made.made[0].check
    assert check is not None
    assert check.compared == 20
    assert not check.worst
    assert 0 < check.activation < (1e-3 if dtype == "float32" else 1e-9)
    assert "largest edge error" in capsys.readouterr().out


def test_a_check_over_its_bound_fails_when_the_graphs_are_written(
    graph: Callable[..., GraphsMade], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "perturbed", lambda *given: perturbed(*given) * 1.01)
    with pytest.raises(GranaryError, match=r"1 check failed, the first of .*: edges \d.*expected at most 1e-03"):
        graph(target=("img_2:max:3",), check=True)
    monkeypatch.undo()
    monkeypatch.setitem(checks.ACTIVATION, "float32", 0.0)
    with pytest.raises(GranaryError, match=r"1 check failed.*: activation \d"):
        graph(target=("img_2:max:3",), check=True)
    monkeypatch.undo()
    monkeypatch.setitem(checks.CONSERVATION, "float32", 0.0)
    with pytest.raises(GranaryError, match="conservation"):
        graph(target=("img_2:max:3",), check=True)
    assert (tmp_path / "g" / "summary.parquet").exists()


def test_an_activation_that_is_not_the_preactivation_is_seen(graph: Callable[..., GraphsMade], tmp_path: Path) -> None:
    graph(target=("img_2:max:3",))
    found = Graph.read(tmp_path / "g")
    z = found.nodes["activation"].to_numpy(zero_copy_only=False).astype(float)
    z[found.nodes["order"].to_numpy(zero_copy_only=False) == 2] *= 1.01
    place = NODES.get_field_index("activation")
    wrong = Graph(found.nodes.set_column(place, NODES.field(place), pa.array(z, from_pandas=True)), found.edges, {})
    assert checks.activation_error(found) < 1e-5
    assert 5e-3 < checks.activation_error(wrong) < 1.1e-2


def test_the_page_and_the_further_forms_lie_beside_the_graph(graph: Callable[..., GraphsMade], tmp_path: Path) -> None:
    graph(target=("img_2:max:3",), page=True, export="circuit-tracer,graphml")
    for name in ("index.html", "graph.graphml", "circuit-tracer"):
        assert (tmp_path / "g" / name).exists(), name


@pytest.mark.slow
def test_flux_is_not_run_and_no_module_of_it_is_made(traced_flux: Path, tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
import torch
from analyze.circuits.command import run
from analyze.circuits.settings import GraphSettings
made = []
def noticing(module, *given, **named):
    made.append(type(module))
    real(module, *given, **named)
real, torch.nn.Module.__init__ = torch.nn.Module.__init__, noticing
folder = Path({str(traced_flux)!r})
run(GraphSettings(store=folder / "store", dictionaries=folder / "dictionaries", out=Path({str(tmp_path / "g")!r}), image=0, step=1,
                  target=("img_2:max:3",), nodes=3))
assert not [name for name in sys.modules if name.split(".")[0] in ("diffusers", "transformers", "harvest")]
ours = ("train.dictionaries", "torch.nn.modules.linear", "torch.nn.modules.container", "torch.nn.modules.activation")
assert made and not [kind for kind in made if not kind.__module__.startswith(ours)], made
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)


def test_a_table_of_nothing_has_the_columns_of_a_summary(graph: Callable[..., GraphsMade]) -> None:
    made = graph(target=("img_2:max:3",), plan=True)
    assert isinstance(made.summary, pa.Table)
    assert "paths_img" in made.summary.column_names
