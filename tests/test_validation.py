"""`analyze validate` on graphs of tiny-flux: what is measured is what the model does, and what is predicted what the graph says."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from analyze.circuits.command import run as make_graphs
from analyze.circuits.graph import Graph
from analyze.circuits.influence import column
from analyze.circuits.settings import GraphSettings
from analyze.steering.drawing import Painter, open_painter, shots_of
from analyze.validation import command as validation
from analyze.validation.agreement import agreement_table, compared, spearman
from analyze.validation.command import Validation, run
from analyze.validation.files import Together
from analyze.validation.node_writes import readers_of
from analyze.validation.pairwise import effects, influences
from analyze.validation.perturbed_runs import calls_of, plain_pass
from analyze.validation.settings import ValidateSettings
from analyze.validation.text import rows_text
from store import Site, open_store
from store.errors import DamagedError, GranaryError, MismatchError, UsageError
from store.files import read_json, write_json
from tests.frozen_flux import frozen
from tests.object_server import tree
from tests.traced_tiny_flux import transcoder
from train.dictionaries.checkpoint import save_dictionary
from train.dictionaries.collection import load_dictionaries

Validate = Callable[..., Validation]


@pytest.fixture(scope="module")
def graphs(traced_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs of a feature at two images, and of a supernode."""
    out = tmp_path_factory.mktemp("graphs") / "g"
    usual: dict[str, Any] = {
        "store": traced_flux / "store", "dictionaries": traced_flux / "dictionaries", "out": out, "nodes": 6, "batch": 3, "page": False,
        "min_attribution": 0.0,  # or rests would be without what was dropped of them
    }  # fmt: skip
    make_graphs(GraphSettings(**usual, image="0-1", step=3, target=("img_2:max:3",)))
    make_graphs(GraphSettings(**usual, image="0-1", step=3, supernode=("pair=img_2:max:3+0.5*img_1:max:2",)))
    return out


@pytest.fixture(scope="module")
def painter(traced_flux: Path) -> Painter:
    """The model of the store, loaded once."""
    folder = traced_flux / "dictionaries"
    return open_painter(open_store(traced_flux / "store"), batch_size=1, dictionaries=folder)


@pytest.fixture
def validate(
    graphs: Path, traced_flux: Path, painter: Painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Validate:
    """Runs the command with the loaded model: `validate("v", eps=0.5)` into tmp_path/v."""
    monkeypatch.setattr(validation, "open_painter", lambda *_, **__: replace(painter, forwards=0))

    def make(out: str = "v", **options: Any) -> Validation:
        usual = {"graphs": (graphs,), "store": traced_flux / "store", "dictionaries": traced_flux / "dictionaries"}
        return run(ValidateSettings(**{**usual, "out": tmp_path / out, "batch_size": 3, **options}))

    return make


@pytest.fixture(scope="module")
def whole(graphs: Path, traced_flux: Path, painter: Painter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a run of everything that is perturbed by default."""
    out = tmp_path_factory.mktemp("validated") / "v"
    place: dict[str, Any] = {"store": traced_flux / "store", "dictionaries": traced_flux / "dictionaries"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "open_painter", lambda *_, **__: replace(painter, forwards=0))
        run(ValidateSettings(graphs=(graphs,), out=out, batch_size=3, **place))
    return out


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever loads the model fails."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(validation, "open_painter", refuse)
    yield


def tables(found: Validation) -> Together:
    assert found.together is not None
    return found.together


def columns(table: pa.Table | None, *names: str) -> list[np.ndarray]:
    assert table is not None
    return [np.asarray(table[name].to_numpy(zero_copy_only=False)) for name in names]


def test_with_patterns_and_norms_frozen_too_edges_are_what_the_model_does(validate: Validate) -> None:
    options: dict[str, Any] = {
        "hold": "mlps", "sources": "feature,error,rest", "exactness": False, "eps": 0.5, "most": 24, "batch_size": 8,
    }  # fmt: skip
    with frozen():
        found = tables(validate(**options))
    predicted, measured, attribution = columns(found.direct, "predicted", "measured", "attribution")
    assert len(predicted) > 100 and found.pairwise is None and found.direct is not None
    assert set(found.direct["kind"].to_pylist()) == {"feature", "error", "rest"}
    assert len(set(found.direct["way"].to_pylist())) > 1
    np.testing.assert_array_equal(predicted, -0.5 * attribution)
    np.testing.assert_allclose(measured, predicted, atol=2e-5 * np.abs(predicted).max())
    (live,) = columns(tables(validate("live", **options)).direct, "measured")
    assert np.abs(live - predicted).max() > 0.01 * np.abs(predicted).max()  # what is live makes a difference


def test_a_skip_path_stays_live_while_mlps_are_held(
    traced_flux: Path, validate: Validate, painter: Painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    for layer in range(3):
        for stream in ("img", "txt"):
            made = transcoder(f"{stream}_{layer}", skip=True)
            made.skip.weight.data = 0.05 * torch.randn(128, 128, generator=generator)
            save_dictionary(tmp_path / "skips" / made.name, made, None, [])
    place: dict[str, Any] = {"store": traced_flux / "store", "dictionaries": tmp_path / "skips"}
    make_graphs(
        GraphSettings(**place, out=tmp_path / "g", image=1, step=3, target=("img_2:max:3",), nodes=7, page=False)
    )
    with frozen():
        found = tables(
            validate(hold="mlps", graphs=(tmp_path / "g",), dictionaries=tmp_path / "skips", exactness=False)
        )
    predicted, measured, layers = columns(found.direct, "predicted", "measured", "layers")
    assert (layers == 2).any()  # over a block whose skip path is on the way
    np.testing.assert_allclose(measured, predicted, atol=2e-5 * np.abs(predicted).max())


def test_a_feature_taken_away_is_an_ablation_by_hand(whole: Path, painter: Painter, traced_flux: Path) -> None:
    from harvest.replacing import replace as replaced

    rows = [
        row
        for row in pq.read_table(whole / "pairwise.parquet").to_pylist()
        if row["image"] == 1 and row["target"].startswith("feature_L2_img")
    ]
    store, sites = open_store(traced_flux / "store"), load_dictionaries(traced_flux / "dictionaries")
    dictionaries = {each.site: each for each in sites}
    call = calls_of(replace(painter), shots_of(store, [1])[0], [3])[3]
    transformer = painter.sampler.pipe.transformer
    for row in (rows[0], rows[len(rows) // 2], rows[-1]):
        (at, token, feature), (to, read, wanted) = (parsed(row[end]) for end in ("source", "target"))

        def pre(changes: Any, to: Site = to, read: int = read, wanted: int = wanted) -> float:
            seen: list[torch.Tensor] = []

            def look(_moment: Any, given: torch.Tensor, _output: torch.Tensor) -> None:
                seen.append(given[:, read])

            with torch.inference_mode(), replaced(transformer, {**changes, (to, "mlp"): [look]}):
                transformer(**call.repeated(1, torch.float32))
            return float(dictionaries[to].preactivation(seen[0], torch.tensor([call.sigma]))[0, wanted])

        def ablate(
            _moment: Any,
            given: torch.Tensor,
            output: torch.Tensor,
            at: Site = at,
            token: int = token,
            feature: int = feature,
        ) -> torch.Tensor:
            one = dictionaries[at]
            z = one.encode(given[:, token], torch.tensor([call.sigma]))
            without = z.clone()
            without[:, feature] = 0
            new = output.clone()
            new[:, token] += one.decode(without) - one.decode(z)
            return new

        assert row["measured"] == pytest.approx(pre({(at, "mlp"): [ablate]}) - pre({}), abs=2e-5)


def parsed(name: str) -> tuple[Site, int, int]:
    _, layer, stream, token, feature = name.split("_")
    return Site.parse(f"{stream}_{layer[1:]}"), int(token[1:]), int(feature[1:])


def test_influence_and_effect_on_the_explained_target_are_those_of_the_graph(graphs: Path) -> None:
    for folder in sorted(graphs.glob("graphs/*")):
        graph = Graph.read(folder)
        (target,) = [reader.row for reader in readers_of(graph) if reader.asked]
        others = np.arange(len(graph.nodes)) != target
        np.testing.assert_allclose(influences(graph, target)[others], column(graph, "influence")[others], rtol=1e-9)
        np.testing.assert_allclose(effects(graph, target)[others], column(graph, "effect")[others], rtol=1e-9)


def test_a_source_that_cannot_reach_a_reader_changes_nothing_there(whole: Path) -> None:
    facts = read_json(whole / "validation.json")
    assert facts["out_of_reach"] <= 1e-6
    assert facts["drift"] <= 1e-5 and facts["exactness"] <= 1e-5


def test_a_plain_pass_at_a_step_reads_what_the_harvest_stored_and_draws_no_later_step(
    painter: Painter, traced_flux: Path
) -> None:
    store, site = open_store(traced_flux / "store"), Site.parse("txt_1")
    again = replace(painter, forwards=0)
    calls = calls_of(again, shots_of(store, [1])[0], [1])
    assert again.forwards == 2 and list(calls) == [1]
    plain = plain_pass(painter.sampler.pipe.transformer, calls[1], [site])
    traced = store.trace_block(1, 1, site.layer)
    np.testing.assert_allclose(plain.inputs[site].numpy(), np.asarray(traced["mlp_in.txt"]), atol=1e-4)
    np.testing.assert_allclose(plain.outputs[site].numpy(), np.asarray(traced["mlp_out.txt"]), atol=1e-4)


def test_results_are_the_same_bytes_stopped_or_not_and_say_what_they_are_of(
    validate: Validate, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "two")
    facts = read_json(whole / "validation.json")
    done = [tmp_path / "two" / "graphs" / graph["name"] for graph in facts["graphs"]]
    shutil.rmtree(done[0])
    (done[1] / "done.json").unlink()
    for path in (tmp_path / "two").glob("*.*"):
        if path.name != "run.json":
            path.unlink()
    again = validate("two")
    assert tree(whole) == tree(tmp_path / "two")
    assert again.rows == 2 * sum(facts["graphs"][number]["perturbed"] for number in (0, 1))
    capsys.readouterr()
    assert validate("two").rows == 0
    said = capsys.readouterr().out
    assert (
        "plan: 0 graphs of 0 images (4 graphs finished already); the transformer" in said
        and "runs 0 times to draw, 0 times whole" in said
    )
    said = (whole / "validation.md").read_text()
    for word in ("tiny-flux", "supernode_pair", "| 3 |", "Spearman"):
        assert word in said, word
    with Image.open(whole / "validation.png") as picture:
        assert picture.width > 1200
    with pytest.raises(UsageError, match="settings batch_size 3, now 4: choose another --out"):
        validate("two", batch_size=4)


def test_a_cut_table_of_a_graph_is_one_message(whole: Path, validate: Validate, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "cut")
    path = next((tmp_path / "cut" / "graphs").glob("*/direct.parquet"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(
        DamagedError, match=r"direct.parquet cannot be read .* remove its folder and run the command again"
    ):
        validate("cut")


def test_running_out_of_memory_is_one_message_that_names_the_batch(
    validate: Validate, painter: Painter, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    validate("o", plan=True)
    assert "memory: the model, the transcoders, and beside what 4 rows at once take" in capsys.readouterr().out
    forward = painter.sampler.pipe.transformer.forward

    def full(*arguments: Any, **options: Any) -> Any:
        if len(options["hidden_states"]) > 1:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        return forward(*arguments, **options)

    monkeypatch.setattr(painter.sampler.pipe.transformer, "forward", full)
    with pytest.raises(
        GranaryError, match=r"a run of 4 rows .* does not fit .* use a smaller --batch-size .tried to allocate 9 GiB"
    ):
        validate("o", hold="nothing", exactness=False)


def test_kinds_of_source_are_told_apart_on_the_terminal() -> None:
    sign = {"feature": 1.0, "error": -1.0, "rest": -1.0}
    facts = {"graph": "g", "stream": "img", "padding": False, "way": "same token"}
    made = [{**facts, "kind": k, "predicted": v, "measured": sign[k] * v} for k in sign for v in (0.0, 1.0, 2.0, 3.0)]
    lines = rows_text(agreement_table(compared(pa.Table.from_pylist(made), None))).splitlines()
    told = {line.split()[1]: line.split()[4] for line in lines}
    assert told == {"of": "Spearman", "all": "12", "features": "1.000", "errors": "-1.000", "rests": "-1.000"}


def test_figures_are_scipys_pooled_and_graph_by_graph(whole: Path) -> None:
    direct, pairwise = (pq.read_table(whole / f"{name}.parquet") for name in ("direct", "pairwise"))
    rows = {(row["test"], row["of"]): row for row in pq.read_table(whole / "agreement.parquet").to_pylist()}
    predicted, measured = columns(direct, "predicted", "measured")
    pooled = rows["direct", "all graphs"]
    assert (pooled["n"], pooled["graphs"]) == (len(predicted), 4)
    assert pooled["spearman"] == pytest.approx(spearmanr(predicted, measured).statistic)
    assert pooled["pearson"] == pytest.approx(np.corrcoef(predicted, measured)[0, 1])
    names = [graph["name"] for graph in read_json(whole / "validation.json")["graphs"]]
    own = [rows["direct", name]["spearman"] for name in names]
    assert pooled["mean"] == pytest.approx(np.mean([each for each in own if each is not None]))
    influence, change = columns(pairwise.filter(pairwise["asked"]), "influence", "measured")
    assert rows["pairwise", "all graphs"]["spearman"] == pytest.approx(spearmanr(influence, np.abs(change)).statistic)
    assert rows["pairwise", "all graphs"]["slope"] is None
    assert spearman(np.ones(5), np.arange(5.0)) is None and spearman(np.ones(2), np.ones(2)) is None
    few = agreement_table(compared(direct.slice(0, 2), None)).to_pylist()
    assert few[0]["n"] == 2 and few[0]["spearman"] is None


def test_only_the_most_influential_nodes_are_perturbed(validate: Validate) -> None:
    found = tables(validate(most=2, hold="mlps", exactness=False))
    assert [graph["perturbed"] for graph in found.facts["graphs"]] == [2] * 4


def test_a_picture_that_does_not_come_out_again_is_refused(validate: Validate, graphs: Path, tmp_path: Path) -> None:
    shutil.copytree(graphs, tmp_path / "other")
    for folder in (tmp_path / "other" / "graphs").iterdir():
        graph = Graph.read(folder)
        pre = pa.array(2 * column(graph, "pre"), pa.float64(), from_pandas=True)
        Graph(
            graph.nodes.set_column(graph.nodes.schema.get_field_index("pre"), "pre", pre), graph.edges, graph.facts
        ).write(folder)
    with pytest.raises(MismatchError, match="drawn again"):
        validate(graphs=(tmp_path / "other",))


def test_a_plan_counts_and_loads_nothing(
    no_model: None, traced_flux: Path, graphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place: dict[str, Any] = {"store": traced_flux / "store", "dictionaries": traced_flux / "dictionaries"}
    run(ValidateSettings(graphs=(graphs,), out=tmp_path / "v", plan=True, **place))
    said = capsys.readouterr().out
    assert "4 graphs of 2 images" in said and "runs 8 times to draw" in said and not (tmp_path / "v").exists()


def changed(graphs: Path, tmp_path: Path, **facts: Any) -> Path:
    """A copy of the graphs whose records say something else."""
    out = shutil.copytree(graphs, tmp_path / "changed")
    for path in out.glob("graphs/*/facts.json"):
        write_json(path, {**read_json(path), **facts})
    return out


def refusal(graphs: Path, traced_flux: Path, tmp_path: Path, case: str) -> tuple[dict[str, Any], type[Exception], str]:
    """What is asked for, and what is said."""
    if case == "no graphs":
        return {"graphs": (tmp_path,)}, UsageError, "holds no graphs"
    if case == "another store":
        return (
            {"graphs": (changed(graphs, tmp_path, store="sha256-" + 64 * "0"),)},
            MismatchError,
            "explains a trace of store",
        )
    if case == "another dictionary":
        folder = shutil.copytree(traced_flux / "dictionaries", tmp_path / "d")
        made = transcoder("img_1", n_features=48)
        shutil.rmtree(folder / made.name)
        save_dictionary(folder / made.name, made, None, [])
        return {"dictionaries": folder}, MismatchError, "is not the transcoder of img_1"
    if case == "no dictionary":
        folder = shutil.copytree(traced_flux / "dictionaries", tmp_path / "d")
        shutil.rmtree(folder / "transcoder_txt_0")
        return {"dictionaries": folder}, UsageError, "has no transcoder of txt_0"
    if case == "another place":
        (tmp_path / "v").mkdir()
        (tmp_path / "v" / "mine.txt").write_text("mine")
        return {}, UsageError, "holds no validation"
    return {"graphs": (graphs, graphs / "graphs")}, UsageError, "holds no graphs"


@pytest.mark.parametrize(
    "case", ["no graphs", "another store", "another dictionary", "no dictionary", "another place", "graphs of graphs"]
)
def test_what_does_not_belong_together_is_refused_before_the_model_is_loaded(
    case: str, no_model: None, graphs: Path, traced_flux: Path, tmp_path: Path
) -> None:
    options, error, said = refusal(graphs, traced_flux, tmp_path, case)
    usual = {"graphs": (graphs,), "store": traced_flux / "store", "dictionaries": traced_flux / "dictionaries"}
    with pytest.raises(error, match=said):
        run(ValidateSettings(**{**usual, "out": tmp_path / "v", **options}))


def test_a_graph_with_nothing_below_its_target_is_refused(no_model: None, traced_flux: Path, tmp_path: Path) -> None:
    place: dict[str, Any] = {"store": traced_flux / "store", "dictionaries": traced_flux / "dictionaries"}
    make_graphs(GraphSettings(**place, out=tmp_path / "g", image=1, step=3, target=("img_0:max:3",), page=False))
    with pytest.raises(UsageError, match="nothing to perturb"):
        run(ValidateSettings(graphs=(tmp_path / "g",), out=tmp_path / "v", **place))


@pytest.mark.parametrize(
    ("flag", "value"),
    [("eps", float("nan")), ("eps", 0.0), ("sources", "input"), ("sources", ""), ("most", 0), ("graphs", ())],
)
def test_settings_that_cannot_be_are_refused(flag: str, value: Any, tmp_path: Path) -> None:
    usual: dict[str, Any] = {"graphs": (tmp_path,), "store": tmp_path, "dictionaries": tmp_path, "out": tmp_path / "v"}
    with pytest.raises(UsageError, match=f"--{flag}"):
        ValidateSettings(**{**usual, flag: value})
