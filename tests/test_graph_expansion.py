"""A graph grows best first, adds up whatever is left out, and is the same alone and beside others."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from analyze.circuits import expansion, feeds
from analyze.circuits.aggregation import aggregate
from analyze.circuits.expansion import expand, expand_many
from analyze.circuits.frozen import Attribution, Member, Target
from analyze.circuits.graph import Graph
from analyze.circuits.influence import edge_weights, influence
from analyze.circuits.nodes import Node
from analyze.circuits.pruning import prune
from analyze.circuits.ranking import Ranking
from store.errors import UsageError
from tests.small_graphs import PlantedModel, named_edges

Key = tuple[int, int, int]
LEAST = 1e-3


@pytest.fixture(scope="module")
def model() -> PlantedModel:
    return PlantedModel()


def target_of(model: PlantedModel, number: int = -1) -> Target:
    """One of the active features, by default the last of the top layer."""
    site, token, feature = sorted(model.z)[number]
    return Target((Member(model.sites[site], token, feature),))


def name_of(model: PlantedModel, key: Key, kind: str = "feature") -> str:
    site, token, feature = key
    where = f"{kind}_L{model.sites[site].layer}_{model.sites[site].stream}_p{token}"
    return f"{where}_f{feature}" if kind == "feature" else where


def grown_slowly(model: PlantedModel, target: Target, ranking: Ranking, nodes: int, batch: int) -> list[Key]:
    """The expanded nodes by the rules as they are written, with dictionaries: paths are followed one after the other."""
    member = target.members[0]
    expanded = [(model.sites.index(member.site), member.token, member.feature)]
    while len(expanded) < nodes:
        feed = {key: [each for each in model.below[key] if abs(each[1]) >= LEAST] for key in expanded}
        fed = {key: sum(abs(value) for kind, value, _ in feed[key] if kind != "bias") for key in expanded}
        among = {
            key: sum(abs(value) for kind, value, other in feed[key] if kind == "feature" and other in expanded)
            for key in expanded
        }
        reach: dict[Key, float] = defaultdict(float)

        def follow(key: Key, flow: float) -> None:
            reach[key] += flow  # noqa: B023
            for kind, value, other in feed[key]:  # noqa: B023
                if kind == "feature" and other in feed:  # noqa: B023
                    follow(other, flow * abs(value) / (fed if ranking == "influence" else among)[key])  # noqa: B023

        follow(expanded[0], 1.0)
        score: dict[Key, float] = defaultdict(float)
        for key in expanded:
            for kind, value, other in feed[key]:
                if kind == "feature" and other not in feed:
                    score[other] += abs(value) * reach[key] / (fed[key] if ranking == "influence" else 1)
        room = min(batch, nodes - len(expanded))
        chosen = sorted(score, key=lambda key: (-score[key], key))[:room]
        if not chosen:
            break
        expanded += chosen
    return expanded


def expanded_names(graph: Graph) -> list[str]:
    return [name for name, pre in zip(graph.names, graph.nodes["pre"].to_pylist(), strict=True) if pre is not None]


def assert_adds_up(graph: Graph) -> None:
    into: dict[str, float] = defaultdict(float)
    for (_, target), value in named_edges(graph).items():
        into[target] += value
    pre = {
        name: value
        for name, value in zip(graph.names, graph.nodes["pre"].to_pylist(), strict=True)
        if value is not None
    }
    assert into == pytest.approx(pre, abs=1e-12)


@pytest.mark.parametrize("ranking", ["influence", "difract"])
@pytest.mark.parametrize(("nodes", "batch"), [(1, 10), (20, 1), (25, 10), (12, 100), (10_000, 7)])
def test_the_best_are_expanded_in_order(model: PlantedModel, ranking: Ranking, nodes: int, batch: int) -> None:
    for number in (-1, len(model.z) // 2):
        target = target_of(model, number)
        found = expand(model, [target], ranking, nodes, batch, LEAST)
        wanted = grown_slowly(model, target, ranking, nodes, batch)
        assert expanded_names(found) == [name_of(model, key) for key in wanted]
        assert found.nodes["order"].drop_null().to_pylist() == list(range(len(wanted)))


def test_edges_are_those_of_the_model_and_the_rest_is_summed(model: PlantedModel) -> None:
    found = expand(model, [target_of(model)], "influence", 15, 5, LEAST)
    expanded = set(expanded_names(found))
    wanted: dict[tuple[str, str], float] = defaultdict(float)
    for key, feed in model.below.items():
        target = name_of(model, key)
        if target not in expanded:
            continue
        for kind, value, other in feed:
            source = (
                f"bias_L{model.sites[other[0]].layer}_{model.sites[other[0]].stream}_encoder"
                if kind == "bias"
                else name_of(model, other, kind)
            )
            if abs(value) < LEAST:
                source = "dropped"
            elif kind == "feature" and source not in expanded:
                source = name_of(model, other, "rest")
            wanted[source, target] += value
    for (source, target), value in list(wanted.items()):
        if source.startswith("rest") and abs(value) < LEAST:
            wanted["dropped", target] += wanted.pop((source, target))
    assert named_edges(found) == pytest.approx(dict(wanted), abs=1e-12)
    assert any(source.startswith("rest") for source, _ in wanted)


@pytest.mark.parametrize("budget", [None, 1000, 60, 5, 1])
def test_a_budget_keeps_the_edges_that_pass_on_most_to_the_target_and_the_sums(
    model: PlantedModel, budget: int | None
) -> None:
    whole = expand(model, [target_of(model)], "influence", 20, 5, LEAST)
    found = expand(model, [target_of(model)], "influence", 20, 5, LEAST, budget)
    assert_adds_up(found)
    assert expanded_names(found) == expanded_names(whole)
    score = edge_weights(whole) * influence(whole)[whole.targets]
    ends = zip(whole.sources, whole.targets, score.tolist(), strict=True)
    every = {(whole.names[a], whole.names[b]): value for a, b, value in ends if whole.names[a] != "dropped"}
    kept = {pair for pair in named_edges(found) if pair[0] != "dropped"}
    assert kept <= set(every)
    assert len(kept) == min(budget or len(every), len(every))
    left = [value for pair, value in every.items() if pair not in kept]
    assert min(every[pair] for pair in kept) >= 0.99 * max(left, default=0.0)  # sums here lack what the threshold took
    totals = found.facts["totals"]
    assert totals["edges"] == len(found.edges)
    assert totals["nodes"] == len(found.nodes)
    assert totals["expanded"] == 20
    for way in totals["shares"].values():
        assert sum(way.values()) == pytest.approx(1.0)
    assert_adds_up(prune(aggregate(found)))


def test_nothing_is_dropped_without_a_threshold(model: PlantedModel) -> None:
    found = expand(model, [target_of(model)], "influence", 20, 5, 0.0)
    assert "dropped" not in found.names
    assert_adds_up(found)


def test_effects_of_the_leaves_sum_to_the_target_and_influence_is_a_share(model: PlantedModel) -> None:
    found = expand(model, [target_of(model)], "influence", 30, 5, LEAST)
    leaf = np.asarray([pre is None for pre in found.nodes["pre"].to_pylist()])
    effects = found.nodes["effect"].to_numpy()
    assert effects[leaf].sum() == pytest.approx(found.facts["targets"][0]["pre"])
    kinds = np.asarray(found.nodes["kind"].to_pylist())
    influences = found.nodes["influence"].to_numpy()
    assert influences[leaf & ~np.isin(kinds, ["bias", "dropped"])].sum() == pytest.approx(1.0)


def test_several_targets_share_a_graph(model: PlantedModel) -> None:
    targets = [target_of(model, -1), target_of(model, -2), target_of(model, -20)]
    found = expand(model, targets, "influence", 12, 4, LEAST)
    assert found.nodes["target"].to_pylist()[:4] == [True, True, True, False]
    assert found.nodes["order"].to_pylist()[:5] == [0, 0, 0, 1, 2]
    assert [target["name"] for target in found.facts["targets"]] == found.names[:3]
    assert {"site", "token", "feature", "activation", "pre"} < set(found.facts["targets"][0])
    assert len(expanded_names(found)) == 12
    assert_adds_up(found)


def test_a_supernode_is_traced_as_the_weighted_sum_of_its_members(model: PlantedModel) -> None:
    first, second = target_of(model, -1).members[0], target_of(model, -3).members[0]
    members = (first, Member(second.site, second.token, second.feature, -0.5))
    found = expand(model, [Target(members, "both")], "influence", 6, 3, 0.0)
    assert found.names[0] == "supernode_both"
    z = [model.activation(member.site, member.token, member.feature) for member in members]
    row = found.nodes.to_pylist()[0]
    assert row["pre"] == row["activation"] == pytest.approx(z[0] - 0.5 * z[1])
    assert_adds_up(found)
    assert [member["weight"] for member in found.facts["targets"][0]["members"]] == [1.0, -0.5]
    assert aggregate(found).names[0] == "supernode_both"


@pytest.mark.parametrize("held", [2_000, 30, 1])
def test_graphs_made_together_are_those_made_alone(monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    model = PlantedModel(seed=1)
    groups = [[target_of(model, number)] for number in (-1, -2, -5, -30)] + [
        [target_of(model, -1), target_of(model, -9)]
    ]
    alone = [expand(model, targets, "influence", 15, 5, LEAST) for targets in groups]
    monkeypatch.setattr(expansion, "HELD", held)
    monkeypatch.setattr(feeds, "TOGETHER", 7)
    model.asked.clear()
    heard: list[int] = []
    for one, other in zip(
        alone, expand_many(model, groups, "influence", 15, 5, LEAST, None, heard.append), strict=True
    ):
        assert one.nodes == other.nodes
        assert one.edges == other.edges
        assert one.facts == other.facts
    assert sum(heard) == sum(graph.facts["totals"]["expanded"] for graph in alone)
    if held == 2_000:
        assert len(model.asked) == len(set(model.asked)) < sum(heard)


def test_a_feature_maps_to_all_tokens_where_it_is_active(model: PlantedModel) -> None:
    found = expand(model, [target_of(model)], "influence", 15, 5, LEAST)
    for row in [*found.nodes.to_pylist(), *aggregate(found).nodes.to_pylist()]:
        if row["kind"] == "feature":
            site = next(
                at for at, site in enumerate(model.sites) if (site.layer, site.stream) == (row["layer"], row["stream"])
            )
            where = {token: z for (at, token, feature), z in model.z.items() if (at, feature) == (site, row["feature"])}
            assert dict(zip(row["map_token"], row["map_value"], strict=True)) == dict(sorted(where.items()))
        elif row["kind"] in ("bias", "dropped"):
            assert row["map_token"] is None


def test_a_graph_comes_back_from_disk_with_equal_bytes(model: PlantedModel, tmp_path: Path) -> None:
    for name in ("a", "b"):
        expand(model, [target_of(model)], "influence", 15, 5, LEAST).write(tmp_path / name)
    for file in ("nodes.parquet", "edges.parquet", "facts.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    found = Graph.read(tmp_path / "a")
    assert [Node.parse(name).name for name in found.names] == found.names
    assert_adds_up(prune(aggregate(found), 0.5, 0.9))


def test_what_is_no_graph_is_refused(model: PlantedModel) -> None:
    one, other = target_of(model), target_of(model, -2)
    for targets, said in (
        ([], "0 targets"),
        ([one, other], "2 targets and 1"),
        ([Target(one.members + other.members)], "has no name"),
        ([one, one], "twice"),
        ([Target(one.members, "same"), Target(other.members, "same")], "twice"),
    ):
        with pytest.raises(UsageError, match=said):
            expand(model, targets, "influence", 1 if "2 targets" in said else 9, 5, LEAST)


def counted(model: PlantedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of every call of the model from now on how many targets it had, and how many edges the one with most of them."""
    calls: list[tuple[int, int]] = []
    trace = model.attribute

    def heard(targets: Sequence[Target], least: float) -> Attribution:
        found = trace(targets, least)
        calls.append((len(targets), int(np.bincount(found.row, minlength=1).max())))
        return found

    monkeypatch.setattr(model, "attribute", heard)
    return calls


def test_little_memory_traces_few_nodes_at_a_time_and_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PlantedModel(seed=3, density=0.9)
    calls = counted(model, monkeypatch)
    targets = [target_of(model, -1 - number) for number in range(6)]
    whole = expand(model, targets, "influence", 18, 6, 1e-4)
    assert [size for size, _ in calls] == [6, 6, 6]
    most = max(edges for _, edges in calls)
    places = sum(model.tokens[site.stream] for site in model.sites)
    bare, edge = 8 * 32 * places, 8 * feeds.EDGE_BYTES
    for room in (0, 2):  # for two targets with their edges: it would do for many without
        calls.clear()
        monkeypatch.setattr(model, "memory", max(1, room * (bare + edge * most)))
        assert room == 0 or model.memory // bare >= 6
        small = expand(model, targets, "influence", 18, 6, 1e-4)
        assert small.nodes == whole.nodes and small.edges == whole.edges
        assert all(size == 1 or size * (bare + edge * edges) <= model.memory for size, edges in calls)
        assert calls[0][0] == 1
        assert max(size for size, _ in calls) == max(1, room)


@pytest.mark.parametrize("rooms", [1, 2, 5])
def test_as_many_graphs_grow_side_by_side_as_memory_holds_the_edges_of(
    monkeypatch: pytest.MonkeyPatch, rooms: int
) -> None:
    model = PlantedModel(seed=1, density=0.9)
    groups = [[target_of(model, -1 - number)] for number in range(5)]
    held: list[int] = []
    begun: dict[int, expansion._Growing] = {}
    grow = expansion._Growth.round

    def heard(growth: expansion._Growth, graphs: Sequence[expansion._Growing], tell: object) -> None:
        grow(growth, graphs, tell)  # type: ignore[arg-type]
        begun.update({id(graph): graph for graph in graphs})
        held.append(sum(graph.edges for graph in begun.values() if not graph.complete or graph in graphs))

    alone = [expand(model, targets, "influence", 15, 5, LEAST) for targets in groups]
    monkeypatch.setattr(expansion._Growth, "round", heard)
    expand_many(model, groups[:1], "influence", 15, 5, LEAST)
    one = max(held)
    held.clear()
    begun.clear()
    monkeypatch.setattr(model, "memory", 4 * expansion.EDGE_BYTES * (rooms * one + one // 2))
    together = expand_many(model, groups, "influence", 15, 5, LEAST)
    assert 1 if rooms == 1 else one < max(held) <= rooms * one + one // 2
    assert len(held) < 15 if rooms == 5 else len(held) > 3
    for first, second in zip(alone, together, strict=True):
        assert first.nodes == second.nodes and first.edges == second.edges
