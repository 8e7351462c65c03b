"""Text embeddings, each made once: what the text encoders answer for the prompts of a batch.

A *unit* is what is encoded together, because the last digits of an embedding depend on it: a batch of prompts, as it is
drawn, where every prompt is drawn once, and a single prompt where prompts are drawn several times (`--seeds-per-prompt`,
`--cycle`, pictures drawn again).  Either way the same store has the same embeddings, however it is filled.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from store.errors import GranaryError
from store.files import write_bytes

Embedded = tuple[Tensor, ...]
"""what `harvest.models.text.encode` gives; the first dimension of each is the prompt"""
Unit = tuple[str, ...]
Source = Callable[[Unit], Embedded]
CACHE_BYTES = 2**30
"""embeddings of single prompts kept on the host: 256 of FLUX's with 512 text tokens in bfloat16"""


def units_of(prompts: Sequence[str], alone: bool) -> list[Unit]:
    """What is encoded together of a batch of prompts: each alone, or all of them."""
    return [(prompt,) for prompt in dict.fromkeys(prompts)] if alone else [tuple(prompts)]


@dataclass
class Embeddings:
    """Embeddings of any batch, from a source that is asked once a unit as far as `bound` bytes allow."""

    source: Source
    alone: bool
    """each prompt is encoded by itself, and kept"""
    device: Callable[[], torch.device]
    """where the batch is wanted, when it is"""
    bound: int = CACHE_BYTES
    _kept: OrderedDict[str, Embedded] = field(default_factory=OrderedDict, repr=False)

    def of(self, prompts: Sequence[str]) -> Embedded:
        """The embeddings of a batch, in its order, on the device."""
        if not self.alone:
            return tuple(tensor.to(self.device()) for tensor in self.source(tuple(prompts)))
        rows = dict(zip(dict.fromkeys(prompts), map(self._one, dict.fromkeys(prompts)), strict=True))
        self._forget()
        return tuple(torch.cat(each).to(self.device()) for each in zip(*(rows[p] for p in prompts), strict=True))

    @property
    def kept(self) -> tuple[str, ...]:
        """The prompts whose embeddings are at hand, the youngest last."""
        return tuple(self._kept)

    def forget(self) -> None:
        """Keep none of them any longer."""
        self._kept.clear()

    def _one(self, prompt: str) -> Embedded:
        found = self._kept.pop(prompt, None) or tuple(tensor.cpu() for tensor in self.source((prompt,)))
        self._kept[prompt] = found  # now the youngest
        return found

    def _forget(self) -> None:
        size = sum(map(bytes_of, self._kept.values()))
        while size > self.bound:
            size -= bytes_of(self._kept.popitem(last=False)[1])

    def loosely(self) -> "Embeddings":
        """The same for batches that are drawn to be timed and dropped: a batch that was not encoded is made up of others."""
        return replace(self, source=self.source.loosely()) if isinstance(self.source, Ahead) else self


def bytes_of(embedded: Embedded) -> int:
    """Bytes of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in embedded)


class Ahead:
    """A source of units that were encoded before, in files of a folder or, without one, in memory."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._units: dict[str, Unit] = {}
        self._memory: dict[str, Embedded] = {}
        self._loose = False

    def missing(self, units: Iterable[Unit]) -> list[Unit]:
        """Those of `units` that are still to be encoded; all of them are known from now on."""
        keyed = {_key(unit): unit for unit in units}
        self._units |= keyed
        return [unit for key, unit in keyed.items() if not self._is_whole(key)]

    def put(self, unit: Unit, embedded: Embedded) -> None:
        """Keep a unit; a file appears whole or not at all, and several workers may write the same one."""
        named = {f"{number:02d}": tensor.cpu().contiguous() for number, tensor in enumerate(embedded)}
        if self.folder is None:
            self._memory[_key(unit)] = tuple(named.values())
        else:
            write_bytes(self._file(_key(unit)), safetensors.torch.save(named))

    def __call__(self, unit: Unit) -> Embedded:
        """The embeddings of a unit, on the host; `GranaryError` for one that was not encoded."""
        key = _key(unit)
        if self._loose and not self._has(key):
            return self._made_up(unit)
        if self.folder is None:
            if key in self._memory:
                return self._memory[key]
            raise GranaryError(f"the prompts {unit} were not encoded before the text encoders were freed")
        try:
            named = safetensors.torch.load_file(self._file(key))
        except (OSError, safetensors.SafetensorError) as error:
            raise GranaryError(
                f"the text embeddings {self._file(key)} cannot be read ({error}): run the command again, which makes them again"
            ) from None
        return tuple(named[name] for name in sorted(named))

    def loosely(self) -> "Ahead":
        """The same, but prompts that were encoded in another company are answered too."""
        other = Ahead(self.folder)
        other._units, other._memory, other._loose = self._units, self._memory, True
        return other

    def _made_up(self, unit: Unit) -> Embedded:
        rows = []
        for prompt in unit:
            known = next(((k, u) for k, u in self._units.items() if prompt in u and self._has(k)), None)
            key, company = known or next((k, u) for k, u in self._units.items() if self._has(k))
            row = company.index(prompt) if prompt in company else 0
            rows.append(tuple(tensor[row : row + 1] for tensor in self(self._units[key])))
        return tuple(map(torch.cat, zip(*rows, strict=True)))

    def _has(self, key: str) -> bool:
        return key in self._memory if self.folder is None else self._file(key).is_file()

    def _is_whole(self, key: str) -> bool:
        """Whether it is there, and as long as its own header says."""
        if self.folder is None or not self._has(key):
            return self._has(key)
        try:
            with safetensors.safe_open(self._file(key), framework="pt"):
                return True
        except safetensors.SafetensorError:
            return False

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"


def _key(unit: Unit) -> str:
    return hashlib.sha256(json.dumps(unit).encode()).hexdigest()[:32]
