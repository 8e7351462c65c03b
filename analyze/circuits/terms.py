"""One block of the frozen model, prepared: matrices with every frozen factor folded in, and what is constant, per token.

With P, r1, r2, modulations and the choice of active features frozen, a block is affine in the residual that enters it
(DESIGN section 6).  Backward, a gradient g at the residual after the attention becomes, in the residual that enters,

    g + sum over heads of  r1 * P^T (g G W_o) (W_v A)         G = diag(gate_msa),  A = diag(1 + scale_msa) (1 - mean)

so `from_output` = G W_o and `to_values` = W_v A are folded once and a sweep only multiplies.  Constants never touch a gradient of
their own: the value bias of a stream reaches token i as  sum over heads of  (what row i of P gives that stream) * G W_o b_v, a vector
a token, and so does every other constant path.  They stand, with the decoder's directions, as rows of one `table`, and
a sweep multiplies a token's gradients with that token's rows.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from analyze.circuits.encoding import Features, Products, encoded, no_features, products, reader
from analyze.circuits.trace import PROJECTIONS, STREAMS, Trace
from store.sites import Site, Stream
from train import Dictionary

ABOVE = ("error", "residual", "decoder", "skip-rounding", "skip-shift")
"""constants that enter where the MLP writes; `residual` is the rounding of the sums there"""
BETWEEN = ("output", "attention-error", "value-txt", "value-img", "shift-txt", "shift-img")
"""constants that enter where the attention writes, of some by the stream whose values carry them; of block 0 also `input`"""


@dataclass(frozen=True)
class Side:
    """One stream of one block."""

    site: Site
    table: Tensor
    """(row, d_model): directions of the distinct features times gate_mlp, then the constants"""
    features: Features
    rows: dict[str, Tensor]
    """of each constant of `ABOVE` and `BETWEEN` that there is, its row of the table for every token: int64 (token,)"""
    above: Products
    """where the MLP writes; without a skip path also where the attention does, for then the gradient there is the same"""
    between: Products | None
    reads: Tensor
    """(distinct, d_model): what each distinct feature reads of mlp_in"""
    constants: Tensor
    """(distinct,): what its pre-activation has besides"""
    mlp_in: Tensor
    """(token, d_model)"""
    rounding_in: Tensor
    """mlp_in as it was, minus the one replayed: (token, d_model)"""
    r2: Tensor
    gain_mlp: Tensor
    """1 + scale_mlp"""
    shift_mlp: Tensor
    from_output: Tensor
    """(d_model, inner)"""
    to_values: Tensor
    """(inner, d_model)"""
    skip: Tensor | None
    """the skip path and the norm before it, without r2: (d_model, d_model)"""


@dataclass(frozen=True)
class Block:
    """One block, both streams, ready for sweeps."""

    layer: int
    q: Tensor
    """(head, token, d_head), divided by sqrt(d_head)"""
    k: Tensor
    r1: Tensor
    """(token,) of the joint sequence"""
    sides: dict[Stream, Side]
    entering_values: Tensor | None
    """of block 0 what the values are of that residual, constants aside: (head, token, d_head), times r1"""
    replay: dict[str, float]
    """largest relative error of what was replayed: `attention`, `mlp_in`, and `residual` where the next one is known"""

    @property
    def size_bytes(self) -> int:
        """Memory that keeping it takes."""
        tensors = [self.q, self.k, self.r1, self.entering_values]
        for side in self.sides.values():
            tensors += [value for f in fields(side) if isinstance(value := getattr(side, f.name), Tensor)]
            groups = [group for plan in (side.above, side.between) if plan is not None for group in plan.groups]
            tensors += [tensor for group in groups for tensor in (group.rows, group.vectors)]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def patterns(self, heads: slice, rows: slice = slice(None)) -> Tensor:
        """Attention patterns of some heads and rows, computed anew: (head, row, token)."""
        return torch.softmax(torch.bmm(self.q[heads, rows], self.k[heads].transpose(1, 2)), dim=-1)


def centred(values: Tensor) -> Tensor:
    """`values` minus their mean over the last dimension; the gradient of that is the same."""
    return values - values.mean(dim=-1, keepdim=True)


def head_groups(
    n_heads: int, n_tokens: int, itemsize: int, beside: int, memory: int
) -> list[tuple[slice, list[slice]]]:
    """Groups of heads, each with the groups of rows whose patterns are made at once, within `memory`.

    `beside`: bytes that a head needs besides its patterns, whatever the rows.
    """
    row = 2 * n_tokens * itemsize  # the scores and the pattern
    heads = max(1, min(n_heads, memory // (n_tokens * row + beside)))
    rows = n_tokens if heads > 1 else max(1, min(n_tokens, (memory - beside) // row))
    parts = [slice(r, min(r + rows, n_tokens)) for r in range(0, n_tokens, rows)]
    return [(slice(h, min(h + heads, n_heads)), parts) for h in range(0, n_heads, heads)]


def prepare(
    trace: Trace,
    layer: int,
    transcoders: dict[Stream, Dictionary | None],
    known: dict[Stream, Features],
    memory: int,
    gathered: int,
) -> Block:
    """One block of a trace, replayed once: everything that the replay misses becomes a constant.

    `known`: active features that were found before; `memory`: bytes that the work may take beside the result; `gathered`: bytes
    of rows that a sweep gathers at once.
    """
    arrays, following = trace.block(layer), trace.entering(layer + 1)
    heads, d_head = trace.heads
    q = (arrays["q"] * d_head**-0.5).transpose(0, 1).contiguous()
    k = arrays["k"].transpose(0, 1).contiguous()
    r1 = torch.cat([arrays[f"r1.{stream}"] for stream in STREAMS])
    bare = Block(layer, q, k, r1, {}, None, {})
    values: dict[Stream, tuple[Tensor, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    for stream in STREAMS:
        weight, bias = trace.projection(layer, PROJECTIONS[stream][0])
        shift, scale = arrays[f"shift_msa.{stream}"], 1 + arrays[f"scale_msa.{stream}"]
        n1 = centred(arrays[f"resid.{stream}"]) * arrays[f"r1.{stream}"][:, None] * scale + shift
        values[stream] = (centred(weight * scale), n1 @ weight.T + bias)
        biases |= {f"value-{stream}": bias.view(heads, d_head), f"shift-{stream}": (weight @ shift).view(heads, d_head)}
    mixed, mass = _mixed(bare, torch.cat([values[stream][1] for stream in STREAMS]), trace.tokens["txt"], memory)
    sides, replay, start = {}, {"attention": 0.0, "mlp_in": 0.0, "residual": 0.0}, 0
    for stream in STREAMS:
        span = slice(start, start + trace.tokens[stream])
        start = span.stop
        through = {name: mass[name.split("-")[1]][span, :, None] * bias for name, bias in biases.items()}
        sides[stream] = _side(
            trace, Site("double", layer, stream), {name.split(".")[0]: a for name, a in arrays.items() if name.endswith(stream)},
            None if following is None else following[stream], transcoders.get(stream), known.get(stream), values[stream][0], mixed[span],
            {name: part.flatten(1) for name, part in through.items()}, replay, memory, gathered,
        )  # fmt: skip
    carried = None
    if layer == 0:
        carried = torch.cat([arrays[f"resid.{stream}"] @ sides[stream].to_values.T for stream in STREAMS]) * r1[:, None]
        carried = carried.view(-1, heads, d_head).transpose(0, 1).contiguous()
    return Block(layer, q, k, r1, sides, carried, replay)


def _mixed(block: Block, values: Tensor, n_txt: int, memory: int) -> tuple[Tensor, dict[str, Tensor]]:
    """What the heads mix of `values`, (token, inner), and how much of each token's attention lies on each stream, (token, head)."""
    n_heads, n_tokens, d_head = block.q.shape
    split = values.view(n_tokens, n_heads, d_head).transpose(0, 1)
    mixed = values.new_empty(n_tokens, n_heads, d_head)
    on_text = values.new_empty(n_tokens, n_heads)
    for heads, parts in head_groups(n_heads, n_tokens, values.element_size(), 0, memory):
        for rows in parts:
            pattern = block.patterns(heads, rows)
            mixed[rows, heads] = torch.bmm(pattern, split[heads]).transpose(0, 1)
            on_text[rows, heads] = pattern[:, :, :n_txt].sum(dim=-1).T
    return mixed.flatten(1), {"txt": on_text, "img": 1 - on_text}


def _side(
    trace: Trace,
    site: Site,
    arrays: dict[str, Tensor],
    following: Tensor | None,
    dictionary: Dictionary | None,
    known: Features | None,
    to_values: Tensor,
    mixed: Tensor,
    through: dict[str, Tensor],
    replay: dict[str, float],
    memory: int,
    gathered: int,
) -> Side:
    weight, bias = trace.projection(site.layer, PROJECTIONS[site.stream][1])
    gate, gate_mlp, r2, scale = arrays["gate_msa"], arrays["gate_mlp"], arrays["r2"], 1 + arrays["scale_mlp"]
    attention, mlp_in, mlp_out = arrays["attn"], arrays["mlp_in"], arrays["mlp_out"]
    replayed = torch.addmm(bias, mixed, weight.T)
    between = arrays["resid"] + gate * attention
    read = centred(between) * r2[:, None] * scale + arrays["shift_mlp"]
    from_output = gate[:, None] * weight
    vectors = {"output": (gate * bias)[None], "attention-error": gate * (attention - replayed)}
    vectors |= {name: part @ from_output.T for name, part in through.items()}
    left = between + gate_mlp * mlp_out
    _worst(replay, "attention", replayed, attention)
    _worst(replay, "mlp_in", read, mlp_in)
    if site.layer == 0:
        vectors["input"] = arrays["resid"]
    if following is not None:
        vectors["residual"] = following - left
        _worst(replay, "residual", left, following)
    features, explained, skip = no_features(mlp_in), None, None
    directions = reads = mlp_in.new_zeros(0, trace.d_model)
    constants = mlp_in.new_zeros(0)
    if dictionary is not None:
        features = known or encoded(dictionary, mlp_in, trace.sigma, memory)
        reads, constants = reader(dictionary, features.distinct, trace.sigma, mlp_in)
        chosen = features.distinct.to(dictionary.decoder.weight.device)
        directions = dictionary.decoder.weight.detach()[:, chosen].T.to(mlp_in).contiguous()
        explained = decoded(features, directions, len(mlp_in), memory) + dictionary.output_bias.detach().to(mlp_in)
        vectors["decoder"] = (gate_mlp * dictionary.output_bias.detach().to(mlp_in))[None]
        if dictionary.config.skip:
            matrix = dictionary.skip.weight.detach().to(mlp_in)
            explained = explained + mlp_in @ matrix.T
            vectors["skip-shift"] = (gate_mlp * (matrix @ arrays["shift_mlp"]))[None]
            vectors["skip-rounding"] = gate_mlp * ((mlp_in - read) @ matrix.T)
            skip = centred(gate_mlp[:, None] * matrix * scale)
    vectors["error"] = gate_mlp * (mlp_out if explained is None else mlp_out - explained)
    table, rows = _table(directions * gate_mlp, vectors, len(mlp_in))
    above = {name: rows[name] for name in ABOVE if name in rows}
    below = {name: rows[name] for name in (*BETWEEN, "input") if name in rows}
    merged, budget = skip is None, (trace.d_model, gathered, mlp_in.element_size())
    return Side(
        site, table, features, rows,
        products(features, len(mlp_in), above | below if merged else above, *budget).kept(table, memory // trace.n_blocks),
        None if merged else products(no_features(mlp_in), len(mlp_in), below, *budget),
        reads, constants, mlp_in, mlp_in - read, r2, scale, arrays["shift_mlp"], from_output, to_values, skip,
    )  # fmt: skip


def decoded(features: Features, directions: Tensor, n_tokens: int, memory: int) -> Tensor:
    """What the active features write, (token, d_model), summed in the order of the features."""
    out = directions.new_zeros(n_tokens, directions.shape[1])
    plan = products(features, n_tokens, {}, directions.shape[1], memory, directions.element_size())
    if plan.take is None:
        dense = directions.new_zeros(n_tokens, len(directions))
        dense[features.token, features.row] = features.z
        return dense @ directions
    strengths = directions.new_zeros(sum(group.rows.numel() for group in plan.groups))
    strengths[plan.take] = features.z
    begin = 0
    for group in plan.groups:
        z = strengths[begin : begin + group.rows.numel()].view(len(group.tokens), 1, -1)
        begin += group.rows.numel()
        out[group.tokens] = torch.bmm(z, directions[group.rows])[:, 0]
    return out


def _table(directions: Tensor, vectors: dict[str, Tensor], n_tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Directions and constants one below the other, and of each constant its row for every token: one row for all, or one each."""
    rows, begin = {}, len(directions)
    for name, vector in vectors.items():
        each = torch.arange(n_tokens, device=vector.device)
        rows[name] = begin + (each if len(vector) > 1 else torch.zeros_like(each))
        begin += len(vector)
    return torch.cat([directions, *vectors.values()]), rows


def _worst(replay: dict[str, float], name: str, replayed: Tensor, was: Tensor) -> None:
    """Keep the largest error of what is replayed, relative to the largest value there."""
    error = float((replayed - was).abs().max() / was.abs().max().clamp(min=torch.finfo(was.dtype).tiny))
    replay[name] = max(replay[name], error)
