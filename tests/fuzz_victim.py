"""A store that is harmed, asked everything, and healed: what test_fuzz.py does it to."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from store import Store, open_store
from store.errors import GranaryError
from store.files import self_checked, sha256_bytes
from store.format import StoreMeta
from store.info import describe
from store.layout import ROOT, SEAL

Json = dict[str, Any]


def dumped(content: Any) -> bytes:
    """As JSON of our form, whatever it is: NaN, half surrogates and all."""
    text = json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    return text.encode(errors="surrogatepass")


def honest(content: Any) -> bytes:
    """As JSON with a checksum of its own that holds, where it can have one."""
    if not isinstance(content, dict):
        return dumped(content)
    try:
        return dumped(self_checked(content))
    except (ValueError, RecursionError):
        body = {key: value for key, value in content.items() if key != "sha256"}
        return dumped({**body, "sha256": sha256_bytes(dumped(body))})


class Victim:
    """A store that is harmed, asked, and healed, again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}
        self.attributes: Json = json.loads(self.files[ROOT])["attributes"]["granary"]
        self.questions = dict(_questions(StoreMeta.from_attributes(self.attributes, "here")))
        self._harmed: set[str] = set()
        self.right = self.answers()
        assert not [name for name, answer in self.right.items() if isinstance(answer, Exception)]

    def put(self, name: str, data: bytes | None) -> None:
        """Let a file have another content, or none."""
        if data == self.files.get(name):
            return
        self._harmed.add(name)
        if data is None:
            (self.path / name).unlink()
        else:
            (self.path / name).write_bytes(data)

    def heal(self) -> None:
        for name in self._harmed:
            (self.path / name).write_bytes(self.files[name])
        self._harmed.clear()

    def answers(self, unfinished: bool = False) -> dict[str, Any]:
        """What each question gives: a value, or the error of ours that it raises.  Any other error is not caught."""
        try:
            store = open_store(self.path, unfinished=unfinished)
        except GranaryError as error:
            return {"open": error}
        found: dict[str, Any] = {}
        for name, ask in self.questions.items():
            try:
                found[name] = ask(store)
            except GranaryError as error:
                found[name] = error
        return found

    def refuse_wrong_data(self, found: Mapping[str, Any]) -> None:
        unsealed = isinstance(found.get("id"), GranaryError)  # which `info` says too
        odd = [
            name
            for name, answer in found.items()
            if not isinstance(answer, GranaryError) and answer != self.right[name] and not (unsealed and name == "info")
        ]
        assert not odd, f"wrong data, and no error: {odd}"

    def vouch(self, lies: Mapping[str, bytes]) -> None:
        """Put lies in place, and have record, commits and seal say that they are right."""
        files = {**self.files, **lies}
        origin = _origin(files[ROOT])
        records = [name for name in files if name.startswith("commits/")]
        for name in sorted(set(records) - set(lies)):
            content = json.loads(files[name])
            for listed, entry in content["files"].items():
                entry |= {"bytes": len(files[listed]), "sha256": sha256_bytes(files[listed])}
            if origin is not None:
                content["origin"] = origin
            files[name] = honest(content)
        if SEAL not in lies:
            files[SEAL] = honest({"commits": {Path(name).stem: sha256_bytes(files[name]) for name in records}})
        for name, data in files.items():
            self.put(name, data)


def _origin(root: bytes) -> str | None:
    try:
        return StoreMeta.from_attributes(json.loads(root)["attributes"]["granary"], "here").origin
    except (GranaryError, KeyError, TypeError, ValueError, RecursionError):
        return None


def _questions(meta: StoreMeta) -> Iterator[tuple[str, Callable[[Store], Any]]]:
    """Everything that can be asked of a store, by name."""
    yield "id", lambda store: store.id
    yield "meta", lambda store: (store.meta, store.origin, store.n_images)
    yield "size", lambda store: store.size_bytes
    yield "parts", lambda store: store.committed_parts
    yield "prompts", lambda store: store.prompts().to_pylist()
    yield "info", describe
    for image in range(meta.n_images):
        yield f"picture {image}", lambda store, image=image: _pixels(store.picture(image))
    for site in meta.site_objects:
        yield f"weights of {site}", lambda store, site=site: store.weights_file(site)
        for step in meta.steps:
            yield f"tokens of {site}", lambda store, site=site, step=step: store.tokens(site.stream, step).tolist()
            for point in meta.points:
                key = (site, step, point)
                yield f"read {key}", lambda store, key=key: store.read(*key).tobytes()
                yield f"read some {key}", lambda store, key=key: store.read(*key, 1, 3).tobytes()
                yield f"statistics {key}", lambda store, key=key: _figures(store, *key)


def _figures(store: Store, *key: Any) -> list[Any]:
    found = store.statistics(*key)
    return [found.scalars(), found.mean.tolist(), found.variance.tolist(), found.norm_quantiles(0.1), found.fvu_floor]


def _pixels(picture: Any) -> Any:
    return None if picture is None else (picture.size, picture.tobytes())
