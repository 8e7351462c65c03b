"""Experiment files as plain data: YAML or JSON in, YAML out, equal data in equal bytes.

YAML is read by the types of its version 1.2, as JSON has them: `off` and `no` are words, 1e-5 is a number, 1:30 is text.  Keys that
stand twice, anchors, and anything that would make Python objects are refused.
"""

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from store.errors import UsageError

MOST_BYTES = 64 << 20
WIDTH, SHORT = 140, 120


class _Reader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Knows null, true and false, whole numbers, floats and text; nothing else."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark
            raise UsageError(
                f"line {mark.line + 1}: anchors and aliases are not read; name a supernode, or repeat what is meant"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int):
                raise UsageError(f"line {key_node.start_mark.line + 1}: {key!r} cannot be a key; keys are words")
            if key in found:
                raise UsageError(f"line {key_node.start_mark.line + 1}: {key!r} stands there twice")
            found[key] = self.construct_object(value_node, deep=True)
        return found


class _Writer(yaml.SafeDumper):  # type: ignore[misc]
    """Writes no aliases, and quotes what a YAML 1.1 reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> Any:
        """In double quotes where it has line breaks or signs that other styles would fold or lose."""
        style = '"' if any(not letter.isprintable() for letter in data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> Any:
        """On one line where it is short."""
        return super().represent_mapping(tag, mapping, len(str(mapping)) <= SHORT)

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        """On one line, or wrapped, where it is of numbers and words; one item a line else."""
        return super().represent_sequence(tag, sequence, not any(isinstance(each, dict | list) for each in sequence))


_Writer.add_representer(str, _Writer.represent_str)
for _kind, _pattern, _begins in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    for _of in (
        _Reader,
        _Writer,
    ):  # the writer knows YAML 1.1's already, and quotes what either would not take for text
        _of.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), _begins)
_Reader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
_Reader.add_constructor("tag:yaml.org,2002:map", lambda loader, node: loader.construct_mapping(node, deep=True))


def read_document(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML or, by its name, JSON file; `UsageError`, which names the file and the line, for anything else."""
    if path.is_dir() or not path.exists():
        raise UsageError(
            f"there is no file {path}: --experiment names a YAML or JSON file, as analyze steer writes OUT/experiment.yaml"
        )
    data = path.read_bytes()
    if len(data) > MOST_BYTES:
        raise UsageError(f"{path} has {len(data):,} bytes: that is no experiment file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start})") from None
    try:
        found = _json(text) if path.suffix.lower() == ".json" else yaml.load(text, _Reader)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply to be an experiment") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(found, dict):
        what = "is empty" if found is None else f"holds a {type(found).__name__}"
        raise UsageError(f"{path} {what}; an experiment is a mapping with keys such as images and edits")
    return found


def document_bytes(document: dict[str, Any]) -> bytes:
    """The mapping as YAML, its keys in their order, what is short on one line."""
    text = yaml.dump(
        document, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=WIDTH, default_flow_style=None
    )
    return str(text).encode()


def _json(text: str) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                raise UsageError(f"{key!r} stands there twice")
            found[key] = value
        return found

    return json.loads(text, object_pairs_hook=pairs)
