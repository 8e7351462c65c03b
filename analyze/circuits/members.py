"""What is traced back through a frozen model: features at tokens, alone or several as one."""

from dataclasses import dataclass

from store.errors import UsageError
from store.sites import Site


@dataclass(frozen=True)
class Member:
    """One feature at one token."""

    site: Site
    token: int
    feature: int
    weight: float = 1.0


@dataclass(frozen=True)
class Target:
    """What is traced back: a weighted sum of pre-activations, usually of one feature at one token."""

    members: tuple[Member, ...]
    name: str | None = None
    """of a supernode"""

    def __post_init__(self) -> None:
        if not self.members:
            raise UsageError(f"target {self.name or ''} has no members: name at least one feature at a token")
