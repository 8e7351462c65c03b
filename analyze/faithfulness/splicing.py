"""Dictionaries in the place of MLPs: what a site hands on is what its dictionary makes of what it reads.

    spliced              y' = dictionary(x)         x = mlp_in for a transcoder, mlp_out for an SAE, as they are in this run
    with errors, live    y' = dictionary(x) + (mlp_out - dictionary(x)), both of this run
    with errors, kept    y' = dictionary(x) + e,    e = mlp_out - dictionary(x) of the plain run, by site, step, image and token

Both last ones are the plain run but for rounding.  The third is the local replacement model of a graph (DifFRACT,
arXiv:2606.15796), whose errors are constants: there the MLPs' own outputs are not used at all.

Everything is computed in float32 and handed back in the model's dtype.  The MLP that is replaced still runs: its output is what
the dictionary is compared with.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from harvest.replacing import Change, Moment, Part
from store.errors import MismatchError
from store.sites import Site
from train import Dictionary

BLOCK_VALUES = 2**26
"""activations z that are held at once: rows are encoded in blocks of so many"""
TOKENS = ("all", "real", "padding")
"""what rows are counted together: those of images, those of a prompt's own tokens, and the rest of its text"""


def reconstruct(
    dictionary: Dictionary, x: Float[Tensor, "image token d_model"], sigma: Float[Tensor, " image"]
) -> tuple[Float[Tensor, "image token d_model"], Int[Tensor, "image token"]]:
    """What a dictionary makes of its input, skip path included, in float32; and how many features are active on each row.

    `x` may have any dtype; `sigma` is that of each image's step, as the transformer received it.
    """
    images, tokens, d_model = x.shape
    rows, sigmas = x.reshape(-1, d_model).float(), sigma.float().repeat_interleave(tokens)
    explained, active = torch.empty_like(rows), torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    step = max(1, BLOCK_VALUES // dictionary.config.n_features)
    with torch.autocast(rows.device.type, enabled=False):
        for start in range(0, len(rows), step):
            block = slice(start, start + step)
            z = dictionary.encode(rows[block], sigmas[block])
            linear = dictionary.linear(rows[block], sigmas[block])
            y = dictionary.decode(z)
            explained[block] = y if linear is None else y + linear
            active[block] = (z > 0).sum(dim=-1)
    return explained.view(images, tokens, d_model), active.view(images, tokens)


@dataclass
class Fit:
    """How a dictionary did on some rows, as sums in float64: `row` rows, squared residual, cosine, active features."""

    rows: int = 0
    residual: float = 0.0
    cosine: float = 0.0
    active: float = 0.0

    def add(
        self, explained: Float[Tensor, "row d_model"], target: Float[Tensor, "row d_model"], active: Tensor
    ) -> None:
        """Count these rows too."""
        self.rows += len(target)
        self.residual += float((explained - target).double().square().sum())
        self.cosine += float(functional.cosine_similarity(explained, target, dim=-1).double().sum())
        self.active += float(active.double().sum())


@dataclass
class Spread:
    """How far targets lie from their mean, from sums in float64."""

    rows: int = 0
    total: Tensor | float = 0.0
    squares: float = 0.0

    def add(self, target: Float[Tensor, "row d_model"]) -> None:
        """Count these rows too."""
        self.rows += len(target)
        self.total = self.total + target.double().sum(dim=0)
        self.squares += float(target.double().square().sum())

    @property
    def deviation(self) -> float:
        """The squared deviation from the mean, summed over rows and channels."""
        total = torch.as_tensor(self.total)
        return self.squares - float(total.square().sum()) / max(self.rows, 1)


@dataclass(frozen=True)
class MeanOutput:
    """The mean of a site's plain outputs at each step, of each kind of tokens (`TOKENS`): what explains nothing of them.

    A prompt's own tokens and its padding have means of their own: their outputs lie so far apart that one mean would fit neither.
    """

    at: Mapping[tuple[int, str], Float[Tensor, " d_model"]]
    """(step, kind of tokens) -> mean; `all` is of every row"""

    @classmethod
    def of(cls, spreads: Mapping["Place", "Spread"], site: Site) -> "MeanOutput":
        """Those of the rows that were counted at a site."""
        found: dict[tuple[int, str], Tensor] = {}
        for step in sorted({step for where, step, _ in spreads if where == site}):
            parts = {name: spread for (where, at, name), spread in spreads.items() if (where, at) == (site, step)}
            found |= {(step, name): _mean([part]) for name, part in parts.items()}
            found[step, "all"] = _mean(list(parts.values()))
        return cls(found)

    def __call__(self, moment: Moment, like: Tensor, parts: Sequence[tuple[str, Tensor | None]] = ()) -> Tensor:
        """The means at a step in the shape of `like`, float32; `parts` as `Watch.parts` has them, without them that of all rows."""
        made = self.at[moment.step, "all"].to(like.device).expand(like.shape)
        for name, mask in parts:
            if mask is not None:
                made = torch.where(mask[..., None], self.at[moment.step, name].to(like.device), made)
        return made


def _mean(parts: "Sequence[Spread]") -> Float[Tensor, " d_model"]:
    total = sum((torch.as_tensor(part.total) for part in parts), torch.zeros(()))
    return torch.as_tensor(total / max(sum(part.rows for part in parts), 1)).float()


Place = tuple[Site, int, str]
"""where rows are counted together: site, denoising step, and which tokens (`TOKENS`)"""


@dataclass
class Watch:
    """What is counted while the model runs: `fits` of the dictionaries that stand in, `spreads` of plain outputs.

    `real` (image, token) says which text tokens of the batch that runs are no padding; it is set before each batch.
    """

    fits: dict[Place, Fit] = field(default_factory=dict)
    spreads: dict[Place, Spread] = field(default_factory=dict)
    real: Bool[Tensor, "image token"] | None = None

    def parts(self, site: Site, rows: Tensor) -> list[tuple[str, Tensor | None]]:
        """The rows (image, token) that are counted together: a name and a mask, None for all."""
        if site.stream != "txt" or self.real is None:
            return [("all", None)]
        real = self.real.to(rows.device)
        assert real.shape == rows.shape[:2], (str(site), tuple(real.shape), tuple(rows.shape))
        return [("real", real), ("padding", ~real)]

    def compare(self, moment: Moment, explained: Tensor, target: Tensor, active: Tensor) -> None:
        """Count a dictionary's reconstruction of the outputs of a site in this run."""
        for name, mask in self.parts(moment.site, target):
            fit = self.fits.setdefault((moment.site, moment.step, name), Fit())
            counts = active.to(target.device)
            fit.add(_chosen(explained, mask), _chosen(target, mask), counts.flatten() if mask is None else counts[mask])

    def observe(self, moment: Moment, _input: Tensor, output: Tensor) -> None:
        """Count the plain outputs of a site: a change that changes nothing."""
        for name, mask in self.parts(moment.site, output):
            self.spreads.setdefault((moment.site, moment.step, name), Spread()).add(_chosen(output.float(), mask))


def _chosen(values: Tensor, mask: Tensor | None) -> Tensor:
    return values.flatten(0, 1) if mask is None else values[mask]


@dataclass
class KeptErrors:
    """What the dictionaries leave unexplained in a plain run of one batch: (site, step) -> (image, token, d_model), on the CPU."""

    values: dict[tuple[Site, int], Float[Tensor, "image token d_model"]] = field(default_factory=dict)

    def recording(self, dictionaries: Mapping[Site, Dictionary]) -> dict[tuple[Site, Part], list[Change]]:
        """Changes that change nothing and keep the errors of the run they are in."""

        def keeping(dictionary: Dictionary) -> Change:
            def keep(moment: Moment, read: Tensor, output: Tensor) -> None:
                explained, _ = reconstruct(dictionary, _input_of(dictionary, read, output), moment.sigma)
                self.values[moment.site, moment.step] = (output.float() - explained).cpu()

            return keep

        return {(site, "mlp"): [keeping(dictionary)] for site, dictionary in dictionaries.items()}

    def of(self, moment: Moment, like: Tensor) -> Tensor:
        """The errors of a site and step on the device of `like`; `MismatchError` where another batch was recorded, or none."""
        found = self.values.get((moment.site, moment.step))
        if found is None or found.shape != like.shape:
            what = "none" if found is None else f"those of shape {tuple(found.shape)}"
            raise MismatchError(
                f"errors of {moment.site} at step {moment.step} for {tuple(like.shape)} are needed, and {what} were kept: "
                "draw the same images plainly first, with `recording` as changes"
            )
        return found.to(like.device)


def splice(
    dictionaries: Mapping[Site, Dictionary | MeanOutput],
    steps: Collection[int] | None = None,
    errors: bool | KeptErrors = False,
    watch: Watch | None = None,
) -> dict[tuple[Site, Part], list[Change]]:
    """Changes for `harvest.replacing.replace`: at each site its dictionary in the place of the MLP, at `steps` (None: all).

    A `MeanOutput` may stand in too; which text tokens are padding it knows from `watch`.

    `errors`: False for the dictionary alone; True adds what it leaves unexplained in this run; `KeptErrors` adds what it left
    unexplained in a plain run of the same batch.  `watch` counts how well the dictionaries do in the run, at these steps.
    """
    return {
        (site, "mlp"): [_standing_in(dictionary, None if steps is None else frozenset(steps), errors, watch)]
        for site, dictionary in dictionaries.items()
    }


def _standing_in(
    dictionary: Dictionary | MeanOutput,
    steps: frozenset[int] | None,
    errors: bool | KeptErrors,
    watch: Watch | None,
) -> Change:
    def change(moment: Moment, read: Tensor, output: Tensor) -> Tensor | None:
        if steps is not None and moment.step not in steps:
            return None
        target = output.float()
        if isinstance(dictionary, MeanOutput):
            parts = watch.parts(moment.site, target) if watch is not None else ()
            explained, active = dictionary(moment, target, parts), torch.zeros(target.shape[:2], dtype=torch.int64)
        else:
            explained, active = reconstruct(dictionary, _input_of(dictionary, read, output), moment.sigma)
        if watch is not None:
            watch.compare(moment, explained, target, active)
        if isinstance(errors, KeptErrors):
            explained = explained + errors.of(moment, target)
        elif errors:
            explained = explained + (target - explained)
        return explained.to(output.dtype)

    return change


def _input_of(dictionary: Dictionary, read: Tensor, output: Tensor) -> Tensor:
    """What of an MLP a dictionary reads: its input for a transcoder, its output for an SAE."""
    return read if dictionary.input_point == "mlp_in" else output
