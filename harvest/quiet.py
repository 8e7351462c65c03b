"""Keeps the model libraries from talking about themselves while ours does the talking.

What matters to a user (prompts cut short, a model that cannot be had) is counted and said once by the
harvest; what does not (a missing optional image backend, weight loading bars) is noise on every run.
Errors are still shown.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet() -> Iterator[None]:
    """While the context lasts, transformers and diffusers log errors only and draw no bars."""
    transformers_before, bars_before = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(transformers_before)
        if bars_before:
            transformers_logging.enable_progress_bar()
        diffusers_logging.set_verbosity(diffusers_before)
