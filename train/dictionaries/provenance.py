"""Whether two things belong together, by what each says of the model that its activations come from.

What decides is the hash of the transformer's weights in use, which is another one in another dtype.  Activations that were
imported, and dictionaries trained by others, do not say: that is allowed, and whoever meets it prints a note.
"""

from typing import Any

from store.errors import MismatchError

SHOWN = 12


def transformer_hash(model: dict[str, Any]) -> str | None:
    """The hash of the transformer's weights among a store's facts about its model; None where there is none."""
    found = model.get("weights_sha256")
    value = found.get("transformer") if isinstance(found, dict) else found
    return None if value is None else str(value)


def model_name(model: dict[str, Any]) -> str:
    """How messages name a model: `tiny-flux (transformer 1a2b3c4d5e6f…)`."""
    found = transformer_hash(model)
    name = str(model.get("id") or "an unnamed model")
    return f"{name} (transformer {found[:SHOWN]}…)" if found else f"{name} (of unknown weights)"


def check_same_model(one: str, one_model: dict[str, Any], other: str, other_model: dict[str, Any], remedy: str) -> bool:
    """Whether both are known to come from one model; `MismatchError`, naming both, when it is known that they do not."""
    found = transformer_hash(one_model), transformer_hash(other_model)
    if None in found:
        return False
    if found[0] != found[1]:
        raise MismatchError(
            f"{one} is of {model_name(one_model)}, {other} is of {model_name(other_model)}, which is another model "
            f"(or the same in another dtype): {remedy}"
        )
    return True
