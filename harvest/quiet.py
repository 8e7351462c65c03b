"""Keeps the model libraries from talking about themselves while ours does the talking.

What matters to a user (prompts cut short, a model that cannot be had) is counted and said once by the
harvest; what does not (a missing optional image backend, weight loading bars) is noise on every run.
Errors are still shown.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet() -> Iterator[None]:
    """While the context lasts, transformers and diffusers log errors only and draw no bars."""
    from diffusers.utils import logging as diffusers_logging

    bars_before = transformers_logging.is_progress_bar_enabled()
    levels = {each: each.get_verbosity() for each in (transformers_logging, diffusers_logging)}
    for each, level in levels.items():
        if level != ERROR:  # a level that is set makes every logger forget what it knows: not once a batch
            each.set_verbosity(ERROR)
        each.disable_progress_bar()
    try:
        yield
    finally:
        if bars_before:
            transformers_logging.enable_progress_bar()
        for each, level in levels.items():
            if level != ERROR:
                each.set_verbosity(level)
