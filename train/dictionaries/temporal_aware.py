"""The published transcoders of DifFRACT as its own code offers them: the same names, calls and keys.

A script written for the published model page runs with another import line:

    from train import TemporalAwareTranscoder, load_transcoders

    transcoders = load_transcoders("weights/temporal-aware-transcoders", layers=range(16))
    y_hat, z = transcoders["img_6"](x, t)

Ours (`train.load_dictionaries`) know their site, and are called with a sigma for each row; these know neither.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from store.errors import UnreachableError, UsageError
from store.sites import Site
from train.dictionaries.checkpoint import CONFIG, load_dictionary
from train.dictionaries.dictionary import Dictionary, sinusoidal
from train.dictionaries.hub import fetch, may_be_on_hub, on_hub
from train.dictionaries.published import import_file, why_not_difract

RELEASE = "temporal-aware-transcoders"
"""the folder of transcoders in the published repository"""


class TemporalAwareTranscoder(nn.Module):
    """The architecture of record by its published name: parameters, constructor and calls are those of the reference.

    `state_dict` has the keys of the published files, so `load_state_dict(torch.load(file, weights_only=True))` works.
    A new one draws from torch's global generator: encoder and decoder by the same rule as `Dictionary.initialise`, the time
    MLP by another, Kaiming-normal with zero biases.  `python -m train` does not start from it.
    """

    def __init__(
        self, d_model: int, expansion_factor: int | float, time_embed_dim: int, l1_coeff: float | None = None
    ) -> None:
        super().__init__()
        self.d_model, self.d_feat = d_model, int(d_model * expansion_factor)
        self.time_embed_dim, self.l1_coeff = time_embed_dim, l1_coeff
        self.time_mlp = nn.Sequential(
            nn.Linear(time_embed_dim, time_embed_dim), nn.SiLU(), nn.Linear(time_embed_dim, time_embed_dim), nn.SiLU()
        )
        self.mod_linear = nn.Linear(time_embed_dim, 2 * d_model)
        self.encoder = nn.Linear(d_model, self.d_feat)
        self.decoder = nn.Linear(self.d_feat, d_model)
        self._initialise()

    @classmethod
    def of(cls, dictionary: Dictionary) -> "TemporalAwareTranscoder":
        """The same transcoder or SAE under the published calls; parameters are shared.  `UsageError` says why not."""
        config = dictionary.config
        why = why_not_difract(config)
        if why is not None:
            raise UsageError(f"{dictionary.name} is no {cls.__name__}: {why}")
        assert config.time_embed_dim is not None
        with torch.device("meta"):
            made = cls(config.d_model, config.n_features / config.d_model, config.time_embed_dim)
        made.d_feat = config.n_features
        made.time_mlp, made.mod_linear = dictionary.time_mlp, dictionary.mod_linear
        made.encoder, made.decoder = dictionary.encoder, dictionary.decoder
        return made.train(dictionary.training)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstruction and the features z of x (..., d_model) at timesteps t: one, or one for each row of x."""
        y_hat, z, _ = self.forward_with_preact(x, t)
        return y_hat, z

    def forward_with_preact(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The reconstruction, the features, and the features before ReLU."""
        embedding = sinusoidal(t.to(device=x.device, dtype=torch.float32).view(-1), self.time_embed_dim)
        z, pre = self.encode(x, embedding.to(x.dtype))
        return self.decode(z), z, pre

    def encode(self, x: Tensor, t_emb: Tensor) -> tuple[Tensor, Tensor]:
        """The features after and before ReLU, from the sinusoidal embedding of t (row, time_embed_dim)."""
        scale, shift = self.get_modulation(t_emb)
        pre = self.encoder(x * (1 + scale) + shift)
        return functional.relu(pre), pre

    def decode(self, z: Tensor) -> Tensor:
        """The reconstruction from features."""
        return self.decoder(z)  # type: ignore[no-any-return]

    def get_modulation(self, t_emb: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift (row, d_model) from the sinusoidal embedding of t."""
        scale, shift = self.mod_linear(self.time_mlp(t_emb)).chunk(2, dim=-1)
        return scale, shift

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Give every decoder column unit norm, in place."""
        self.decoder.weight.copy_(functional.normalize(self.decoder.weight, dim=0))

    @torch.no_grad()
    def _initialise(self) -> None:
        nn.init.kaiming_uniform_(self.decoder.weight)
        self.encoder.weight.copy_(self.decoder.weight.T)
        for layer in (self.time_mlp[0], self.time_mlp[2]):
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            layer.bias.zero_()
        for zero in (self.encoder.bias, self.decoder.bias, self.mod_linear.weight, self.mod_linear.bias):
            zero.zero_()
        self.normalize_decoder()


TemporalAwareSAE = TemporalAwareTranscoder
"""the SAE of the comparison, which differs only in what it was trained on"""


def load_transcoders(
    transcoder_dir: str | Path, layers: Iterable[int] = range(16), d_model: int = 3072, expansion_factor: int | float = 16,
    time_embed_dim: int = 256, *, streams: Sequence[str] = ("img", "txt"), device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32, requires_grad: bool = False, skip_missing: bool = False,
    revision: str | None = None,
) -> dict[str, TemporalAwareTranscoder]:  # fmt: skip
    """The transcoders of some layers, as `{"img_0": …, "txt_0": …, "img_1": …}`, in eval mode.

    `transcoder_dir` is a folder of published files (`transcoder_img_0.pt`) or of our dictionaries (`transcoder_img_0/`), the
    whole published repository, or one on the hub: `OWNER/NAME`, `hf://OWNER/NAME[@REVISION]/folder`.
    Errors: `UsageError` lists the layers that are missing (unless `skip_missing`), names both sizes where a file has others
    than asked for, and says why where one of ours is not of the published kind.
    """
    sites = [Site.parse(f"{stream}_{layer}") for layer in layers for stream in streams]
    folder = _folder(transcoder_dir, [f"transcoder_{site}" for site in sites], revision)
    places = {site: _place(folder, site) for site in sites}
    missing = [str(site) for site, place in places.items() if place is None]
    if missing and (not skip_missing or len(missing) == len(sites)):
        raise UsageError(
            f"{transcoder_dir} has no transcoder of {', '.join(missing)}: name the layers= and streams= that it has"
        )
    asked = (d_model, int(d_model * expansion_factor), time_embed_dim)
    found = {}
    for site, place in places.items():
        if place is not None:
            transcoder = TemporalAwareTranscoder.of(_load(place))
            sizes = (transcoder.d_model, transcoder.d_feat, transcoder.time_embed_dim)
            if sizes != asked:
                names = ("d_model", "features (d_model * expansion_factor)", "time_embed_dim")
                there, here = (
                    ", ".join(f"{n} {v}" for n, v in zip(names, size, strict=True)) for size in (sizes, asked)
                )
                raise UsageError(f"{place} has {there}; asked for were {here}")
            found[str(site)] = transcoder.to(device=device, dtype=dtype).requires_grad_(requires_grad)
    return found


def _folder(place: str | Path, names: list[str], revision: str | None) -> Path:
    files = [f"{name}{end}" for name in names for end in (".pt", "/*")]
    files += [f"{RELEASE}/{file}" for file in files]
    if on_hub(place):
        folder = fetch(place, files, revision)
    elif may_be_on_hub(place):
        try:
            folder = fetch(f"hf://{place}", files, revision)
        except (UsageError, UnreachableError) as error:
            raise type(error)(f"there is no folder {place}, so it was looked for on the hub: {error}") from None
    else:
        folder = Path(place)
        if not folder.is_dir():
            raise UsageError(f"there is no folder {folder}: name one that holds files such as transcoder_img_0.pt")
    return folder / RELEASE if (folder / RELEASE).is_dir() else folder


def _place(folder: Path, site: Site) -> Path | None:
    ours, published = folder / f"transcoder_{site}", folder / f"transcoder_{site}.pt"
    return ours if (ours / CONFIG).exists() else published if published.is_file() else None


def _load(place: Path) -> Dictionary:
    return load_dictionary(place) if place.is_dir() else import_file(place)
