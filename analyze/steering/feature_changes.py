"""Carries edits out while the model runs: what `analyze.steering.interventions.changes` hands to `harvest.replacing.replace`.

A row of the batch is one picture and is computed alone, in float32:

1. z of the edited features at the tokens that may change: from their encoder rows alone where every feature is judged by
   itself (ReLU, BatchTopK's threshold, JumpReLU), from the whole encoder where they compete (TopK).
2. z' by the edits in force at this step, in their order.
3. difference: mlp_out + W_dec (z' - z); replacement and splice: dictionary(x) + W_dec (z' - z), at all tokens.
4. Back in the model's dtype, it is written where it differs; everything else keeps its bits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from analyze.steering.edits import FeatureEdit, StreamOff
from harvest.replacing import Moment
from store.errors import UsageError
from store.sites import Site
from train.dictionaries.dictionary import Dictionary

ENCODED = 1 << 26
"""activations of all features that are held at once, in tokens * features; more tokens are encoded in parts"""

Key = tuple[Site, str]
"""a dictionary's site and kind"""
Peaks = Mapping[Key, np.ndarray]
"""(feature,): the greatest activation of each feature of a dictionary in an analysis; what strengths in peaks count in"""
Rows = tuple[Tensor | slice, Tensor]
"""tokens of a row, and what becomes of them"""
Plan = TypeVar("Plan")


class FeaturePlan:
    """What one intervention does with one dictionary: everything that is the same at every step, gathered once."""

    def __init__(
        self, dictionary: Dictionary, edits: tuple[FeatureEdit, ...], grid: tuple[int, int], replaces: bool,
        spliced: bool, peaks: np.ndarray | None,
    ) -> None:  # fmt: skip
        self.dictionary = dictionary
        self.edits = tuple(replace(edit, tokens=edit.tokens.resolved(grid)) for edit in edits)
        self.replaces, self.spliced = replaces, spliced
        features = tuple(dict.fromkeys(feature for edit in edits for feature in edit.features))
        place = {feature: index for index, feature in enumerate(features)}
        device = dictionary.encoder.weight.device
        self.features = torch.tensor(features, dtype=torch.int64, device=device)
        self.places = [
            torch.tensor([place[feature] for feature in edit.features], device=device) for edit in self.edits
        ]
        self.positions = [
            None if edit.tokens.positions is None else torch.tensor(sorted(edit.tokens.positions), device=device)
            for edit in self.edits
        ]
        """tokens of each edit, None where they are not fixed"""
        with torch.no_grad():
            self.encoder = dictionary.encoder.weight[self.features].float()
            self.bias = dictionary.encoder.bias[self.features].float()
            self.directions = dictionary.decoder.weight[:, self.features].T.float().contiguous()
            """(edited, d_model): decoder columns"""
            self.strengths = [self._strength(edit, peaks) for edit in self.edits]
            """(feature of the edit,) each"""

    def _strength(self, edit: FeatureEdit, peaks: np.ndarray | None) -> Float[Tensor, " feature"]:
        """A strength for each feature of an edit, in activations or in lengths of its column."""
        index = list(edit.features)
        strength = torch.full((len(index),), float(edit.strength), device=self.features.device)
        if edit.unit == "peak":
            assert peaks is not None, f"{edit} was not checked"
            strength = strength * torch.tensor(np.asarray(peaks, np.float32)[index], device=strength.device)
        if edit.normalised:
            norms = self.dictionary.decoder.weight[:, index].float().norm(dim=0)
            strength = strength / norms.clamp(min=torch.finfo(torch.float32).tiny)
        return strength

    def changed(
        self,
        step: int,
        sigma: Float[Tensor, ""],
        given: Float[Tensor, "token d_model"],
        output: Float[Tensor, "token d_model"],
    ) -> Rows | None:
        """Which tokens of a row become what, in the output's dtype; None where nothing changes."""
        chosen = [index for index, edit in enumerate(self.edits) if edit.at(step)]
        whole = self.spliced or (self.replaces and bool(chosen))
        if not whole and not chosen:
            return None
        source = given if self.dictionary.input_point == "mlp_in" else output
        tokens = torch.arange(len(output), device=output.device) if whole else self._tokens(chosen, output)
        z, base = self._read(source[tokens].float(), sigma, chosen, whole)
        weights = self._weights(chosen, z, tokens)
        touched = (weights != 0).any(dim=1).nonzero()[:, 0]
        change = weights[touched] @ self.directions
        if base is not None:
            base[touched] += change
            return slice(None), base.to(output.dtype)
        if not len(touched):
            return None
        at = tokens[touched]
        return at, (output[at].float() + change).to(output.dtype)

    def _tokens(self, chosen: Sequence[int], output: Tensor) -> Int[Tensor, " token"]:
        """The tokens that these edits may change, ascending."""
        fixed = [found for index in chosen if (found := self.positions[index]) is not None]
        if len(fixed) < len(chosen):
            return torch.arange(len(output), device=output.device)
        ascending: Tensor = torch.unique(torch.cat(fixed))  # type: ignore[no-untyped-call]
        return ascending

    def _read(
        self, x: Float[Tensor, "token d_model"], sigma: Float[Tensor, ""], chosen: Sequence[int], whole: bool
    ) -> tuple[Float[Tensor, "token edited"], Float[Tensor, "token d_model"] | None]:
        """z of the edited features, and the whole reconstruction where it is asked for."""
        dictionary, config = self.dictionary, self.dictionary.config
        if whole or (config.activation == "topk" and self._needs_z(chosen)):
            found, base = [], []
            for part, at in _parts(x, sigma, config.n_features):
                z = dictionary.encode(part, at)
                found.append(z[:, self.features])
                if whole:
                    y_hat, linear = dictionary.decode(z), dictionary.linear(part, at)
                    base.append(y_hat if linear is None else y_hat + linear)
            return torch.cat(found), torch.cat(base) if whole else None
        if not self._needs_z(chosen):
            return x.new_zeros(len(x), len(self.features)), None
        pre = functional.linear(dictionary.prepare(x, sigma.expand(len(x))), self.encoder, self.bias)
        if config.activation == "jumprelu":
            return pre * (pre > dictionary.log_threshold[self.features].exp()), None
        z = functional.relu(pre)
        return z * (z > dictionary.threshold) if config.activation == "batchtopk" else z, None

    def _needs_z(self, chosen: Sequence[int]) -> bool:
        return any(self.edits[i].mode != "add" or self.edits[i].tokens.above is not None for i in chosen)

    def _weights(
        self, chosen: Sequence[int], z: Float[Tensor, "token edited"], tokens: Int[Tensor, " token"]
    ) -> Float[Tensor, "token edited"]:
        """How much of each direction is added at each token: z' - z, and what `add` adds."""
        new, added = z.clone(), torch.zeros_like(z)
        for index in chosen:
            edit, places, strength = self.edits[index], self.places[index], self.strengths[index]
            where = self._where(index, z[:, places], tokens)
            now = new[:, places]
            if edit.mode == "add":
                added[:, places] += where * strength
            elif edit.mode == "zero":
                new[:, places] = now.masked_fill(where, 0)
            elif edit.mode == "set":
                new[:, places] = torch.where(where, strength, now)
            else:
                factor = strength if edit.mode == "amplify" else -strength
                new[:, places] = torch.where(where, factor * now, now)
        return (new - z) + added

    def _where(
        self, index: int, z: Float[Tensor, "token feature"], tokens: Int[Tensor, " token"]
    ) -> Bool[Tensor, "token feature"]:
        """Which tokens an edit touches, for each of its features."""
        above, positions = self.edits[index].tokens.above, self.positions[index]
        if above is not None:
            return (z > 0) & (z >= above * z.amax(dim=0))
        if positions is None:
            return torch.ones_like(z, dtype=torch.bool)
        return torch.isin(tokens, positions)[:, None].expand_as(z)


@dataclass(frozen=True)
class FeatureChange:
    """Changes the MLP of a site row by row, each by its plan; a `harvest.replacing.Change`."""

    plans: Sequence[FeaturePlan | None]
    shared: bool
    """one plan for all rows"""

    def __call__(
        self,
        moment: Moment,
        given: Float[Tensor, "image token d_model"],
        output: Float[Tensor, "image token d_model"],
    ) -> Tensor | None:
        """The new output, a copy; None where no row changes."""
        new: Tensor | None = None
        with torch.no_grad():
            for row, plan in enumerate(_one_a_row(self.plans, self.shared, output, moment)):
                if plan is None:
                    continue
                _check_device(plan.dictionary, output)
                found = plan.changed(moment.step, moment.sigma[row], given[row], output[row])
                if found is not None:
                    new = output.clone() if new is None else new
                    new[row, found[0]] = found[1]
        return new


@dataclass(frozen=True)
class Off:
    """Writes zeros where a row's stream is off; a `harvest.replacing.Change`."""

    offs: Sequence[tuple[StreamOff, ...]]
    shared: bool

    def __call__(self, moment: Moment, given: Tensor, output: Tensor) -> Tensor | None:
        """The new output, a copy; None where nothing is off at this step."""
        rows = _one_a_row(self.offs, self.shared, output, moment)
        silent = [row for row, offs in enumerate(rows) if any(off.at(moment.step) for off in offs)]
        if not silent:
            return None
        new = output.clone()
        new[silent] = 0
        return new


def _one_a_row(plans: Sequence[Plan], shared: bool, output: Tensor, moment: Moment) -> Sequence[Plan]:
    if shared:
        return [plans[0]] * len(output)
    if len(plans) != len(output):
        raise UsageError(f"{moment.site}: {len(plans)} interventions for a batch of {len(output)} pictures")
    return plans


def _parts(x: Tensor, sigma: Tensor, n_features: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows in parts whose features fit into `ENCODED`, with the sigma of each row."""
    for part in torch.split(x, max(1, ENCODED // n_features)):
        yield part, sigma.expand(len(part))


def _check_device(dictionary: Dictionary, output: Tensor) -> None:
    here = dictionary.encoder.weight.device
    if here != output.device:
        raise UsageError(f"{dictionary.name} lies on {here}, the model on {output.device}: move it there first")
