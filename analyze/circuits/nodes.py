"""The nodes of attribution graphs and their names.

    feature_L3_img_p12_f66     feature 66 of the transcoder of double block 3, image stream, at token 12
    error_L2_img_p12           what the transcoder there leaves unexplained of mlp_out
    input_L0_img_p12           the residual that enters block 0
    rest_L2_img_p12            active features there that were not expanded, together
    bias_L2_img_value          a constant path of block 2; the last word says which (`BIAS_TERMS`)
    dropped                    everything under the thresholds
    supernode_red              several features that were asked for together

An aggregated graph has no tokens: `feature_L3_img_f66`, `error_L2_img`, `input_img`, `rest_L2_img`, `bias_L2_img_value`.
"""

import re
from dataclasses import dataclass
from typing import Literal

from store.errors import ForeignError
from store.sites import Site, Stream

NodeKind = Literal["feature", "error", "input", "rest", "bias", "dropped", "supernode"]

BIAS_TERMS: dict[str, str] = {
    "encoder": "the encoder's bias and what its shift by the denoising step adds",
    "decoder": "the decoder's bias",
    "value": "the bias of the value projection",
    "output": "the bias of the attention's output projection",
    "shift-attention": "adaLN's shift before the attention",
    "shift-mlp": "adaLN's shift before the MLP",
    "attention-error": "attention output as it was, minus the one replayed from the trace",
    "rounding": "residual and MLP input as they were, minus the replayed ones",
}
"""the constant paths of one block and stream, each with what it is"""

_NAME = re.compile(
    r"(?P<kind>feature|error|input|rest)(?:_L(?P<layer>\d+))?_(?P<stream>img|txt|joint)(?:_p(?P<token>\d+))?(?:_f(?P<feature>\d+))?"
    r"|bias_L(?P<bias_layer>\d+)_(?P<bias_stream>img|txt|joint)_(?P<term>[a-z-]+)"
    r"|supernode_(?P<label>.+)"
    r"|(?P<dropped>dropped)"
)


@dataclass(frozen=True)
class Node:
    """One node of a graph; which fields are None follows from its kind and from whether the graph is aggregated."""

    kind: NodeKind
    site: Site | None = None
    token: int | None = None
    feature: int | None = None
    term: str | None = None
    """of a bias node which constant path it is, of a supernode what it is called"""

    @property
    def name(self) -> str:
        """As in files: `feature_L3_img_p12_f66`."""
        if self.kind == "dropped":
            return "dropped"
        if self.kind == "supernode":
            return f"supernode_{self.term}"
        assert self.site is not None
        if self.kind == "bias":
            return f"bias_L{self.site.layer}_{self.site.stream}_{self.term}"
        layer = "" if self.kind == "input" and self.token is None else f"_L{self.site.layer}"
        token = "" if self.token is None else f"_p{self.token}"
        feature = "" if self.feature is None else f"_f{self.feature}"
        return f"{self.kind}{layer}_{self.site.stream}{token}{feature}"

    @classmethod
    def parse(cls, name: str) -> "Node":
        """The node that a name means; `ForeignError` for what is no node's name."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ForeignError(f"{name!r} is no node of a graph: expected a name such as feature_L3_img_p12_f66")
        if match["dropped"]:
            return cls("dropped")
        if match["label"]:
            return cls("supernode", term=match["label"])
        if match["term"]:
            return cls("bias", _site(match["bias_stream"], match["bias_layer"]), term=match["term"])
        kind: NodeKind = match["kind"]  # type: ignore[assignment]  # the pattern admits nothing else
        node = cls(
            kind, _site(match["stream"], match["layer"] or "0"), _number(match["token"]), _number(match["feature"])
        )
        if node.name != name:
            raise ForeignError(f"{name!r} is no node of a graph: a {kind} is called for example {node.name}")
        return node

    @property
    def aggregated(self) -> "Node":
        """The node of an aggregated graph that this one belongs to: the same without its token."""
        return Node(self.kind, self.site, None, self.feature, self.term)


def _site(stream: str, layer: str) -> Site:
    named: Stream = stream  # type: ignore[assignment]  # the pattern admits nothing else
    return Site("single" if named == "joint" else "double", int(layer), named)


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)
