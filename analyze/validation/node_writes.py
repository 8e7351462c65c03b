"""What the nodes of a graph write to an MLP's output, and what they read, as vectors: taken from transcoders and a plain run.

    feature_L3_img_p12_f66   writes z W_dec[:, 66] at token 12, z as the graph has it; reads W_enc[66] (1 + scale)
    error_L2_img_p12         writes mlp_out - transcoder(mlp_in) at token 12; all of mlp_out where the site has no transcoder
    rest_L2_img_p12          writes sum of z_f W_dec[:, f] over the features active there that the graph has not expanded; its edges
                             leave out what was under --min-attribution, so they are a little less than what it does

Before the gate: the model multiplies with it, as it does with the rest of mlp_out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analyze.circuits.encoding import modulation
from analyze.circuits.graph import Graph
from analyze.circuits.members import Member, Target
from analyze.circuits.nodes import Node
from analyze.inputs import Subject
from analyze.validation.perturbed_runs import Perturbation, Places, Plain
from store.sites import Site

Subjects = Mapping[Site, Subject]


@dataclass(frozen=True)
class Reader:
    """An expanded node of a graph: a weighted sum of pre-activations, usually of one feature at one token."""

    row: int
    """in the graph's nodes"""
    target: Target
    asked: bool
    """whether the graph explains it"""
    pre: float
    """its pre-activation, as the graph has it"""

    @property
    def layer(self) -> int:
        """The highest layer that it reads at."""
        return max(member.site.layer for member in self.target.members)


def readers_of(graph: Graph) -> list[Reader]:
    """Every expanded node, in the order of the graph's nodes."""
    members = {
        said["name"]: tuple(
            Member(Site.parse(m["site"]), m["token"], m["feature"], m["weight"]) for m in said["members"]
        )
        for said in graph.facts["targets"]
        if "members" in said
    }
    columns = [graph.nodes[name].to_pylist() for name in ("name", "order", "target", "pre")]
    found = []
    for row, (name, order, asked, pre) in enumerate(zip(*columns, strict=True)):
        if order is None:
            continue
        node = Node.parse(name)
        if node.kind == "supernode":
            target = Target(members[name], node.term)
        else:
            assert node.site is not None and node.token is not None and node.feature is not None
            target = Target((Member(node.site, node.token, node.feature),))
        found.append(Reader(row, target, bool(asked), float(pre)))
    return found


def places_of(readers: Sequence[Reader]) -> dict[Site, list[int]]:
    """The tokens that readers read, of each site, ascending."""
    found: dict[Site, set[int]] = {}
    for reader in readers:
        for member in reader.target.members:
            found.setdefault(member.site, set()).add(member.token)
    return {site: sorted(tokens) for site, tokens in sorted(found.items())}


@dataclass(frozen=True)
class Reading:
    """How readers read mlp_in at one site: vectors (feature, d_model) float64, and constants (feature,)."""

    features: tuple[int, ...]
    vectors: Float[Tensor, "feature d_model"]
    constants: Float[Tensor, " feature"]


def readings_of(readers: Sequence[Reader], subjects: Subjects, sigma: float) -> dict[Site, Reading]:
    """How every site's features are read, on the CPU."""
    wanted: dict[Site, set[int]] = {}
    for reader in readers:
        for member in reader.target.members:
            wanted.setdefault(member.site, set()).add(member.feature)
    found = {}
    for site, features in sorted(wanted.items()):
        dictionary, chosen = subjects[site].dictionary, sorted(features)
        like = torch.empty(0, dtype=torch.float64)
        scale, shift = modulation(dictionary, sigma, like)
        weight = dictionary.encoder.weight.detach()[chosen].to(like)
        constants = weight @ shift + dictionary.encoder.bias.detach()[chosen].to(like)
        found[site] = Reading(tuple(chosen), weight * (1 + scale), constants)
    return found


def read_by(
    readers: Sequence[Reader],
    readings: Mapping[Site, Reading],
    places: Places,
    values: Mapping[Site, Float[Tensor, "row place d_model"]],
    constants: bool = False,
) -> np.ndarray:
    """What readers make of mlp_in at `places`, or of its changes (no constants then): float64 (row, reader)."""
    products = {}
    for site, reading in readings.items():
        found = values[site].double().cpu() @ reading.vectors.T
        products[site] = (found + reading.constants if constants else found).numpy()
    rows = len(next(iter(products.values())))
    read = np.zeros((rows, len(readers)))
    for column, reader in enumerate(readers):
        for member in reader.target.members:
            place = list(places[member.site]).index(member.token)
            feature = readings[member.site].features.index(member.feature)
            read[:, column] += member.weight * products[member.site][:, place, feature]
    return read


def perturbations_of(
    graph: Graph, rows: Sequence[int], plain: Plain, subjects: Subjects, sigma: float, eps: float
) -> list[Perturbation]:
    """What takes away the part `eps` of what each of these nodes writes, on the device of the plain run, float32."""
    nodes = graph.nodes.select(["name", "activation", "order"]).to_pylist()
    expanded: dict[tuple[Site, int], set[int]] = {}
    for said in nodes:
        node = Node.parse(said["name"])
        if node.kind == "feature" and said["order"] is not None:
            assert node.site is not None and node.token is not None and node.feature is not None
            expanded.setdefault((node.site, node.token), set()).add(node.feature)
    found: dict[int, Perturbation] = {}
    parsed = {row: Node.parse(nodes[row]["name"]) for row in rows}
    for row in sorted(rows, key=lambda row: (parsed[row].site, row)):  # a site's dictionary is read once
        node, said = parsed[row], nodes[row]
        assert node.site is not None and node.token is not None
        vector = _written(
            node, said, plain, subjects.get(node.site), expanded.get((node.site, node.token), set()), sigma
        )
        found[row] = Perturbation(node.site, node.token, (-eps * vector).to(plain.outputs[node.site].device))
    return [found[row] for row in rows]


@torch.no_grad()
def _written(
    node: Node, said: Mapping[str, Any], plain: Plain, subject: Subject | None, expanded: set[int], sigma: float
) -> Float[Tensor, " d_model"]:
    """What one node writes to its MLP's output: float32 on the CPU."""
    assert node.site is not None and node.token is not None
    output = plain.outputs[node.site][node.token].float().cpu()
    if subject is None:
        return output
    dictionary = subject.dictionary
    if node.kind == "feature":
        return float(said["activation"]) * dictionary.decoder.weight.detach()[:, node.feature].float()
    x, at = plain.inputs[node.site][node.token].float().cpu()[None], torch.tensor([sigma])
    if node.kind == "error":
        explained: Tensor = dictionary(x, at)[0]
        return output - explained
    z = dictionary.encode(x, at)[0]
    z[sorted(expanded)] = 0
    return dictionary.decoder.weight.detach().float() @ z
