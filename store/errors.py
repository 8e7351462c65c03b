"""What can go wrong, as one tree; every program turns a `GranaryError` into one message and an exit code.

GranaryError                     exit 1: the work failed, or what lies on disk is damaged
├── UsageError  (ValueError)     exit 2: the caller asked for something that cannot be
├── StoreError                   a store, pack or dictionary cannot be used
│   ├── ForeignError             not ours, or of a format version that we do not read
│   ├── DamagedError (OSError)   a file is missing, truncated or differs from its checksum
│   ├── UnfinishedError          parts are still to be written
│   ├── MismatchError            two things that do not belong together
│   └── UnreachableError (OSError)  a server did not answer, or refused
├── LostLeaseError               another process took the part over: nothing of it was committed here
├── NonFiniteError (ValueError)  a NaN or an infinity where none may be
└── Interrupted                  SIGINT or SIGTERM: what was committed is safe
"""


class GranaryError(Exception):
    """A failure that is explained to the user: what was found, what was expected, what to do."""

    exit_code = 1
    said = False
    """whether another process of the same run tells the user"""


class UsageError(GranaryError, ValueError):
    """A wrong flag, a missing input, a combination that cannot be: nothing was done."""

    exit_code = 2


class StoreError(GranaryError):
    """Something on disk that cannot be used as it is."""


class ForeignError(StoreError):
    """Not written by Granary, or in a format version that this version does not read."""


class DamagedError(StoreError, OSError):
    """A file is missing, truncated, or differs from the checksum that was committed with it."""


class UnfinishedError(StoreError):
    """Not all parts are there yet: run the harvest again, it goes on where it was."""


class MismatchError(StoreError):
    """Two things that do not belong together, such as a dictionary and the store of another model."""


class UnreachableError(StoreError, OSError):
    """A server did not answer, or refused: nothing was decided about what lies there."""


class LostLeaseError(GranaryError):
    """Another process took over the part that this one was writing: it stopped before committing anything."""


class NonFiniteError(GranaryError, ValueError):
    """A NaN or an infinity where none may be."""


class Interrupted(GranaryError):
    """SIGINT or SIGTERM arrived: whatever was committed is safe, the rest was dropped."""
