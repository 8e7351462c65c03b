"""Types and shapes of our packages, checked while tests run.

jaxtyping's import hook wraps every function three deep, so that the sizes that its arrays name agree with each other.  A function
whose annotations name no array needs none of that: beartype alone checks the same of it, at a tenth of the price a call.
"""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

PACKAGES = ["store", "harvest", "train", "analyze"]
_with_arrays: Callable[..., Any] = jaxtyping.jaxtyped
_plainly: Callable[[Any], Any] = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))  # the same error


def check_while_running() -> None:
    """Have all modules of ours that are imported from now on checked."""
    jaxtyping.jaxtyped = _checked  # type: ignore[assignment]
    jaxtyping.install_import_hook(PACKAGES, "beartype.beartype")


def _checked(thing: Any = None, *, typechecker: Any) -> Any:
    """In the place of `jaxtyping.jaxtyped`, which the hook puts on each function and class."""
    if thing is None:
        return partial(_checked, typechecker=typechecker)
    try:
        if inspect.isfunction(thing) and _names_no_array(thing):
            return _plainly(thing)
        if inspect.isclass(thing) and dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
            made: Any = thing.__init__
            if inspect.isfunction(made) and not hasattr(made, "__wrapped__") and _names_no_array(made):
                thing.__init__ = _plainly(made)  # type: ignore[method-assign]
                return thing
    except Exception:  # what beartype cannot say of a function alone: its own class, a default that is none
        pass
    return _with_arrays(thing, typechecker=typechecker)


def _names_no_array(function: Any) -> bool:
    """Whether each annotation is known already, and none is an array's or holds one."""
    known = function.__annotations__.values()
    return not any(isinstance(each, str) or "jaxtyping" in str(each) or "ForwardRef" in str(each) for each in known)
