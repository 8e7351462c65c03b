"""What one source of a frozen model adds downstream: a step forward, to check what goes backward.

Written as the model's equations stand (DESIGN section 6), block after block, with nothing folded: what a source writes to the
residual is a change, and the model is linear, so the change is sent on by itself.  Of `sweep` and `terms` nothing is used, and z is
computed anew at the source's token: the two ways agree only if both are right.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from analyze.circuits.encoding import activated, modulation
from analyze.circuits.members import Target
from analyze.circuits.nodes import Node
from analyze.circuits.trace import PROJECTIONS, STREAMS, Trace
from store.errors import UsageError
from store.sites import Site, Stream
from train import Dictionary

State = dict[Stream, Tensor]
"""a change of the residual: (source, token, d_model) a stream"""


@torch.no_grad()
def changes(
    trace: Trace,
    transcoders: Mapping[Site, Dictionary],
    sources: Sequence[Node],
    targets: Sequence[Target],
    memory: int,
) -> np.ndarray:
    """What each source adds to each target's pre-activation: float64 (source, target).  Sources go forward in batches within `memory`."""
    found = np.zeros((len(sources), len(targets)))
    joint = sum(trace.tokens.values())
    most = max(1, memory // (8 * joint * trace.d_model * trace.dtype.itemsize))
    order = sorted(range(len(sources)), key=lambda number: _enters(sources[number]))
    for start in range(0, len(order), most):
        part = order[start : start + most]
        found[part] = _forward(trace, transcoders, [sources[number] for number in part], targets, memory)
    return found


def _enters(source: Node) -> int:
    """The block that a source's change is the first to pass: the one above its own, or block 0."""
    if source.kind not in ("feature", "error", "input") or source.site is None or source.token is None:
        raise UsageError(f"{source.name} cannot be perturbed: features, errors and inputs at a token can")
    return 0 if source.kind == "input" else source.site.layer + 1


def _forward(
    trace: Trace,
    transcoders: Mapping[Site, Dictionary],
    sources: Sequence[Node],
    targets: Sequence[Target],
    memory: int,
) -> np.ndarray:
    """The changes that a batch of sources makes, each grown by itself."""
    found = np.zeros((len(sources), len(targets)))
    like = torch.empty(0, dtype=trace.dtype, device=trace.device)
    state: State = {s: like.new_zeros(len(sources), count, trace.d_model) for s, count in trace.tokens.items()}
    top = max((member.site.layer for target in targets for member in target.members), default=-1)
    for layer in range(min(map(_enters, sources)), top + 1):
        for number, source in enumerate(sources):
            if _enters(source) == layer:
                assert source.site is not None and source.token is not None
                state[source.site.stream][number, source.token] += _vector(trace, transcoders, source, memory)
        between, read = _attention(trace, layer, state)
        for column, target in enumerate(targets):
            for member in target.members:
                if member.site.layer == layer:
                    pre = _pre_change(
                        transcoders[member.site], read[member.site.stream][:, member.token], member.feature, trace.sigma
                    )
                    found[:, column] += member.weight * pre.double().cpu().numpy()
        state = _mlp(trace, layer, transcoders, between, read)
    return found


def _vector(trace: Trace, transcoders: Mapping[Site, Dictionary], source: Node, memory: int) -> Tensor:
    """What one source writes to the residual: (d_model,)."""
    assert source.site is not None and source.token is not None
    arrays, stream = trace.block(source.site.layer), source.site.stream
    if source.kind == "input":
        return arrays[f"resid.{stream}"][source.token]
    gate, one = arrays[f"gate_mlp.{stream}"], transcoders.get(source.site)
    if one is None:
        return gate * arrays[f"mlp_out.{stream}"][source.token]
    x = arrays[f"mlp_in.{stream}"][source.token]
    z = _strengths(one, x, trace.sigma, memory)
    decoder = one.decoder.weight.detach()
    if source.feature is not None:
        return gate * z[source.feature] * decoder[:, source.feature].to(gate)
    active = torch.nonzero(z > 0)[:, 0]
    written = decoder[:, active.to(decoder.device)].to(gate) @ z[active] + one.output_bias.detach().to(gate)
    if one.config.skip:
        written = written + one.skip.weight.detach().to(gate) @ x
    return gate * (arrays[f"mlp_out.{stream}"][source.token] - written)


def _strengths(dictionary: Dictionary, x: Tensor, sigma: float, memory: int) -> Tensor:
    """z of every feature for one row of mlp_in: (n_features,), from the encoder's matrix as it is."""
    weight, bias = dictionary.encoder.weight.detach(), dictionary.encoder.bias.detach()
    scale, shift = modulation(dictionary, sigma, x)
    read, rows = x * (1 + scale) + shift, max(1, memory // (x.shape[0] * x.element_size()))
    pre = torch.cat([weight[start : start + rows].to(x) @ read for start in range(0, len(weight), rows)]) + bias.to(x)
    return activated(dictionary, pre[None])[0]


def _attention(trace: Trace, layer: int, state: State) -> tuple[State, State]:
    """The changes of the residual after a block's attention, and of what its MLPs read."""
    arrays, (heads, d_head) = trace.block(layer), trace.heads
    values = []
    for stream in STREAMS:
        n1 = _normalised(state[stream], arrays[f"r1.{stream}"]) * (1 + arrays[f"scale_msa.{stream}"])
        values.append(n1 @ trace.projection(layer, PROJECTIONS[stream][0])[0].T)
    split = torch.cat(values, dim=1).view(len(values[0]), -1, heads, d_head)
    mixed = torch.empty_like(split)
    for head in range(heads):  # one pattern at a time: they are the largest thing here
        pattern = torch.softmax(arrays["q"][:, head] @ arrays["k"][:, head].T / d_head**0.5, dim=-1)
        mixed[:, :, head] = pattern @ split[:, :, head]
    between, read, start = {}, {}, 0
    for stream in STREAMS:
        part = mixed[:, start : start + trace.tokens[stream]].flatten(2)
        start += trace.tokens[stream]
        written = part @ trace.projection(layer, PROJECTIONS[stream][1])[0].T
        between[stream] = state[stream] + arrays[f"gate_msa.{stream}"] * written
        read[stream] = _normalised(between[stream], arrays[f"r2.{stream}"]) * (1 + arrays[f"scale_mlp.{stream}"])
    return between, read


def _normalised(change: Tensor, inverse: Tensor) -> Tensor:
    """The change of a normalised residual whose deviation is frozen."""
    return (change - change.mean(dim=-1, keepdim=True)) * inverse[:, None]


def _pre_change(dictionary: Dictionary, read: Tensor, feature: int, sigma: float) -> Tensor:
    """The change of one feature's pre-activation, (source,), from those of what it reads."""
    scale, _ = modulation(dictionary, sigma, read)
    return (read * (1 + scale)) @ dictionary.encoder.weight.detach()[feature].to(read)


def _mlp(trace: Trace, layer: int, transcoders: Mapping[Site, Dictionary], between: State, read: State) -> State:
    """The changes of the residual that leaves a block: features are frozen, so only a skip path adds to them."""
    state: State = {}
    for stream in STREAMS:
        one = transcoders.get(Site("double", layer, stream))
        state[stream] = between[stream]
        if one is not None and one.config.skip:
            gate = trace.block(layer)[f"gate_mlp.{stream}"]
            state[stream] = between[stream] + gate * (read[stream] @ one.skip.weight.detach().to(gate).T)
    return state
