"""The scene of bad input to `analyze graph`."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from analyze.circuits.command import run
from analyze.circuits.graph import Graph
from analyze.circuits.settings import GraphSettings
from store import Site, open_store
from store.command import Command, program
from tests.scenes import Place
from tests.traced_tiny_flux import transcoder
from train.dictionaries.checkpoint import save_dictionary

COMMANDS = {"graph": Command(GraphSettings, run, "")}
USUAL = "--image 1 --step 3 --target img_2:max:3"
QUICK = "--nodes 2 --no-page"
PLAIN = "image,step,site,token,feature\n"


@dataclass
class Scene(Place):
    """Copies of a traced store and its transcoders, to be damaged."""

    capture: pytest.CaptureFixture[str]

    @classmethod
    def laid(cls, traced: Path, folder: Path, capture: pytest.CaptureFixture[str]) -> "Scene":
        """A scene in an empty folder."""
        (folder / "store").symlink_to(traced / "store")
        shutil.copytree(traced / "dictionaries", folder / "dictionaries")
        return cls(folder, capture)

    def put(self, site: str, **options: Any) -> None:
        """Put another dictionary in the place of that of a site."""
        made = transcoder(site, **options)
        shutil.rmtree(self.dictionaries / f"transcoder_{site}")
        save_dictionary(self.dictionaries / made.name, made, None, [])

    def say(self, text: str) -> tuple[int, str]:
        """Exit code and message of `analyze graph TEXT`, HERE being the scene's folder."""
        words = [word.replace("HERE", str(self.folder)) for word in text.split()]
        usual = [
            "--store",
            f"{self.folder}/store",
            "--dictionaries",
            f"{self.folder}/dictionaries",
            "--out",
            str(self.out),
        ]
        code = program("analyze", COMMANDS, ["graph", *usual, *QUICK.split(), *words])
        said = self.capture.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == (1 if code else 0), said
        return code, errors[0].removeprefix("error: ") if errors else ""

    def refused(self, text: str, code: int, *said: str) -> str:
        """The message of a command that is refused, with all of `said` in it."""
        found, message = self.say(text)
        assert found == code, message
        for words in said:
            assert words in message, message
        return message


def replace(scene: Scene, made: Any) -> None:
    """Put this transcoder in the place of the one that is there."""
    shutil.rmtree(scene.dictionaries / made.name)
    save_dictionary(scene.dictionaries / made.name, made, None, [])


def silence(scene: Scene, feature: int) -> None:
    """Let a feature of img_2 be active nowhere."""
    made = transcoder("img_2")
    with torch.no_grad():
        made.encoder.bias[feature] = -1e6
    replace(scene, made)


def inactive_token(scene: Scene) -> int:
    """A token at which feature 3 of img_2 is not active in image 1 at step 3."""
    rows = open_store(scene.folder / "store").read(Site.parse("img_2"), 3, "mlp_in", 1, 2)[0]
    z = transcoder("img_2").encode(torch.from_numpy(rows.copy()), torch.ones(len(rows)))[:, 3]
    return int((z == 0).nonzero()[0])


def most_active(scene: Scene) -> int:
    """The token that `max` means for feature 3 of img_2."""
    assert scene.say(USUAL) == (0, "")
    token: int = Graph.read(scene.out).facts["targets"][0]["token"]
    shutil.rmtree(scene.out)
    return token
