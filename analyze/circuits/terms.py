"""One block of the frozen model, prepared: matrices with every frozen factor folded in, and what is constant, per token.

With P, r1, r2, modulations and the choice of active features frozen, a block is affine in the residual that enters it
(DESIGN section 6).  Backward, a gradient g at the residual after the attention becomes, in the residual that enters,

    g + sum over heads of  r1 * P^T (g G W_o) (W_v A)         G = diag(gate_msa),  A = diag(1 + scale_msa) (1 - mean)

so `from_output` = G W_o and `to_values` = W_v A are folded once and a sweep only multiplies.  Constants never touch a gradient of
their own: the value bias of a stream reaches token i as  sum over heads of  (what row i of P gives that stream) * G W_o b_v, a vector
a token, and so does every other constant path.  All vectors of a token stand together (`Constants`), and a sweep multiplies them with
that token's gradients in one product.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from analyze.circuits.encoding import Features, Products, encoded, kept, no_features, products, reader
from analyze.circuits.trace import PROJECTIONS, STREAMS, Trace
from store.sites import Site, Stream
from train import Dictionary

ABOVE = ("error", "residual", "decoder", "skip-rounding", "skip-shift")
"""constants that enter where the MLP writes; `residual` is the rounding of the sums there"""
BETWEEN = ("output", "attention-error", "value-txt", "value-img", "shift-txt", "shift-img")
"""constants that enter where the attention writes, of some by the stream whose values carry them; of block 0 also `input`"""
KEPT = 32 << 20
"""bytes of rows that a site keeps gathered, at most; beyond a cache's size it costs as much to read them as to gather them"""


@dataclass(frozen=True)
class Constants:
    """Vectors that every token has one of, by name."""

    names: tuple[str, ...]
    vectors: Tensor
    """(token, name, d_model)"""

    def of(self, gradients: Tensor) -> Tensor:
        """(token, gradient, name): each times that token's gradients, (token, gradient, d_model)."""
        return torch.bmm(gradients, self.vectors.transpose(1, 2))

    def at(self, tokens: Tensor, gradients: Tensor) -> Tensor:
        """(gradient, name), float64: the vectors of one token each times one gradient (gradient, d_model) there."""
        return (self.vectors[tokens] * gradients[:, None]).sum(dim=-1, dtype=torch.float64)


@dataclass(frozen=True)
class Side:
    """One stream of one block."""

    site: Site
    table: Tensor
    """(distinct, d_model): directions of the distinct features times gate_mlp"""
    features: Features
    products: Products
    """of the gradients with those"""
    above: Constants
    """where the MLP writes; without a skip path also where the attention does, for then the gradient there is the same"""
    between: Constants
    """where the attention writes; in block 0 `input` is the last"""
    reads: Tensor
    """(distinct, d_model): what each distinct feature reads of mlp_in"""
    constants: Tensor
    """(distinct,): what its pre-activation has besides"""
    mlp_in: Constants
    """`mlp_in`, and `rounding`: mlp_in as it was, minus the one replayed"""
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
            parts = [getattr(part, f.name) for part in (side, side.features) for f in fields(part)]
            tensors += [part for part in parts if isinstance(part, Tensor)]
            tensors += [side.above.vectors, side.mlp_in.vectors, None if side.skip is None else side.between.vectors]
        own = sum(t.numel() * t.element_size() for t in tensors if t is not None)
        return own + sum(side.products.kept_bytes for side in self.sides.values())

    def patterns(self, heads: slice, rows: slice = slice(None)) -> Tensor:
        """Attention patterns of some heads and rows, computed anew: (head, row, token)."""
        return torch.softmax(torch.bmm(self.q[heads, rows], self.k[heads].transpose(1, 2)), dim=-1)


def reckoned_bytes(tokens: int, d_model: int, itemsize: int, directions: int = 0) -> int:
    """About what one prepared block takes: vectors of its tokens, folded matrices, what `directions` distinct features read and write."""
    vectors = 2 + 2 + len(ABOVE) + len(BETWEEN)  # q, k, and the constants; two parts of mlp_in
    return itemsize * d_model * (tokens * vectors + 2 * len(STREAMS) * d_model + 2 * directions)


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
    vectors = {"output": gate * bias, "attention-error": gate * (attention - replayed)}
    vectors |= {name: part @ from_output.T for name, part in through.items()}
    left = between + gate_mlp * mlp_out
    _worst(replay, "attention", replayed, attention)
    _worst(replay, "mlp_in", read, mlp_in)
    if site.layer == 0:
        vectors["input"] = arrays["resid"]
    if following is not None:
        vectors["residual"] = following - left
        _worst(replay, "residual", left, following)
    budget = trace.d_model * mlp_in.element_size(), gathered
    features, explained, skip = no_features(mlp_in), None, None
    plan = products(features, len(mlp_in), *budget)
    directions = reads = mlp_in.new_zeros(0, trace.d_model)
    constants = mlp_in.new_zeros(0)
    if dictionary is not None:
        features = known or encoded(dictionary, mlp_in, trace.sigma, memory)
        reads, constants = reader(dictionary, features.distinct, trace.sigma, mlp_in)
        chosen = features.distinct.to(dictionary.decoder.weight.device)
        directions = dictionary.decoder.weight.detach()[:, chosen].T.to(mlp_in).contiguous()
        plan = products(features, len(mlp_in), *budget)
        explained = plan.summed(features.z, directions, memory) + dictionary.output_bias.detach().to(mlp_in)
        vectors["decoder"] = gate_mlp * dictionary.output_bias.detach().to(mlp_in)
        if dictionary.config.skip:
            matrix = dictionary.skip.weight.detach().to(mlp_in)
            explained = explained + mlp_in @ matrix.T
            vectors["skip-shift"] = gate_mlp * (matrix @ arrays["shift_mlp"])
            vectors["skip-rounding"] = gate_mlp * ((mlp_in - read) @ matrix.T)
            skip = centred(gate_mlp[:, None] * matrix * scale)
    vectors["error"] = gate_mlp * (mlp_out if explained is None else mlp_out - explained)
    above, below = ([name for name in names if name in vectors] for names in (ABOVE, (*BETWEEN, "input")))
    wrote = _constants(above + below if skip is None else above, vectors, mlp_in)
    passed = _constants(below, vectors, mlp_in) if skip is not None else None
    table, parts = directions.mul_(gate_mlp), {"mlp_in": mlp_in, "rounding": mlp_in - read}
    return Side(
        site, table, features, kept(plan, table, min(KEPT, memory // (2 * trace.n_blocks))), wrote,
        passed or Constants(tuple(below), wrote.vectors[:, len(above) :]), reads, constants,
        _constants([*parts], parts, mlp_in), r2, scale, arrays["shift_mlp"], from_output, to_values, skip,
    )  # fmt: skip


def _constants(names: list[str], vectors: dict[str, Tensor], like: Tensor) -> Constants:
    """These of the vectors, of which some are of one token each, some of all."""
    stacked = like.new_empty(len(like), len(names), like.shape[1])
    for number, name in enumerate(names):
        stacked[:, number] = vectors[name]
    return Constants(tuple(names), stacked)


def _worst(replay: dict[str, float], name: str, replayed: Tensor, was: Tensor) -> None:
    """Keep the largest error of what is replayed, relative to the largest value there."""
    error = float((replayed - was).abs().max() / was.abs().max().clamp(min=torch.finfo(was.dtype).tiny))
    replay[name] = float(np.maximum(replay[name], error))  # of which NaN stays
