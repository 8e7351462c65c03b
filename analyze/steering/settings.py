"""What `steer` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from analyze.steering.edits import Method
from store.errors import UsageError

DType = Literal["bfloat16", "float16", "float32"]
OF_THE_FILE = ("edit", "off", "splice", "supernode", "strengths", "method", "name", "judge")
"""flags that say what an experiment file says"""
OF_SHOTS = ("images", "prompts", "prompt", "seeds")
EXAMPLES = {"images": "0-7", "name": "red"}


@dataclass(frozen=True, kw_only=True)
class SteerSettings:
    """Draw pictures plain and under interventions on dictionary features, and compare them.  Runs the model, and counts the runs."""

    out: Path
    """Folder of the results; the same command goes on in it where it was stopped."""
    dictionaries: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of dictionaries: ours (`transcoder_img_6/`), or published `.pt` files; not needed for --off alone."""
    store: Annotated[str | Path | None, tyro.conf.arg(metavar="STORE")] = None
    """A store that says which model draws, how large and in how many steps, and whose --images can be drawn again."""
    model: str | None = None
    """Folder of the store's model where its id does not lead to it; without a store, tiny-flux, a folder or a Hugging Face id."""
    experiment: Path | None = None
    """YAML or JSON file that says what is drawn, in place of the flags below; OUT/experiment.yaml of another run is one."""

    images: str | None = None
    """Images of the store to draw again, with their prompts and seeds: 0-7."""
    prompts: Path | None = None
    """File of prompts: text (one a line), CSV, JSONL or Parquet with a column prompt and perhaps seed."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A prompt to draw; several may be given."""
    seeds: str | None = None
    """Noise seeds with which each prompt is drawn: 0-3. Default: those of the images or the file, else 0."""

    edit: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """MODE[:STRENGTH] WHAT [@steps=2-3] [@tokens=CHOICE] [@kind=sae] [@unit=peak] [@normalised], such as "zero img_3:66,70" or
    "amplify:4 red @steps=2-3 @tokens=above:0.5". Modes: zero, amplify (times strength), invert (times minus strength), set (to strength),
    add (strength times the decoder column). CHOICE: all, 3,7-9, above:SHARE of the maximum, mask:FILE.png. Several edits act together."""
    off: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A stream whose MLPs (or attention) write nothing: "txt 0-3 @steps=0 @parts=mlp,attn"."""
    splice: str | None = None
    """Sites whose MLP is replaced by its dictionary, such as img_0-3,txt_2; where a site has both kinds: sae_img_2."""
    supernode: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A name for several features, red=img_3:66+txt_2:5, which an --edit can change as one."""
    method: Method | None = None
    """difference (default): add what the edit changes to the MLP's true output; replacement: the dictionary stands for the MLP."""
    strengths: str | None = None
    """Draw a variant for each of these strengths, 0,1,2,4, in place of the edits' own."""
    name: str | None = None
    """What the experiment is called in tables and pictures."""

    analysis: Path | None = None
    """Folder that `analyze scores` wrote: says the peaks that @unit=peak counts in."""
    clip: str | None = None
    """CLIP model that compares pictures: a folder, an id of the Hugging Face hub, or none. Default: tiny-flux's own for its pictures."""
    judge: str | None = None
    """What was to be changed, colour=red or colour: the judge of tiny-flux's pictures says what became of it. Default: the judge says
    what was kept; none leaves the judge out."""
    batch_size: int | None = None
    """Pictures drawn at once; part of what makes two runs byte-equal. Default: the store's, else 8."""
    dtype: DType | None = None
    """What the model computes in; default: as the store was drawn."""
    device: str | None = None
    """cuda, cuda:1, cpu; default: cuda where there is one."""
    plan: bool = False
    """Say what would be drawn and what it costs; draw and write nothing."""

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"--batch-size is {self.batch_size}: it must be at least 1")
        if self.experiment is not None:
            given = [flag for flag in OF_THE_FILE if getattr(self, flag) not in (None, ())]
            if given:
                raise UsageError(f"--experiment {self.experiment} says what is changed: leave out --{given[0]}")
        for flag in ("images", "name"):
            if (value := getattr(self, flag)) is not None and not value.strip():
                raise UsageError(f"--{flag} is empty: write for example --{flag} {EXAMPLES[flag]}, or leave it out")
        if self.images is not None and (self.prompts is not None or self.prompt):
            raise UsageError("give --images or prompts, not both")
        if self.prompts is not None and self.prompt:
            raise UsageError("give --prompts FILE or --prompt TEXT, not both")
        if self.images is not None and self.store is None:
            raise UsageError(f"--images {self.images} are images of a store: give --store, or --prompt and --seeds")
        if self.store is None and self.model is None and self.experiment is None:
            raise UsageError("nothing says what draws: give --store STORE, --model tiny-flux, or --experiment FILE")

    def document(self) -> dict[str, Any]:
        """What the flags say, with the keys of an experiment file; what was not given is absent."""
        found: dict[str, Any] = {
            "name": self.name, "edits": list(self.edit), "off": list(self.off), "splice": self.splice,
            "method": self.method, "strengths": self.strengths, "supernodes": list(self.supernode), "judge": self.judge,
            **self.shots(),
        }  # fmt: skip
        return {key: value for key, value in found.items() if value not in (None, [])}

    def shots(self) -> dict[str, Any]:
        """What the flags say of what is drawn."""
        prompts = list(self.prompt) or (None if self.prompts is None else str(self.prompts))
        found = {"images": self.images, "prompts": prompts, "seeds": self.seeds}
        return {key: value for key, value in found.items() if value is not None}
