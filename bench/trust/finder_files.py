"""Files of the finders, which are profiles and checkpoints of learning: valid ones, and what they say when read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from l2c_compile.finders import Profile, Work
from l2c_compile.finders.open_evaluations import OpenDenoiser
from l2c_compile.finders.processes import Workers
from l2c_compile.finders.settings import Settings
from l2c_compile.finders.training import Learner
from l2c_compile.schedules.sites import Site

KINDS = ("profile", "checkpoint")
"""What the finders read, by the name of its class."""

_SITES = ("0", "1")
_NUM_EVALUATIONS = 4


class FinderFile:
    """What a file of a finder says; equal for equal content."""

    def __init__(self, tensors: Mapping[str, Tensor], rest: object, save: Callable[[Path], None]) -> None:
        self._tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        self._rest = rest
        self.save = save

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FinderFile):
            return NotImplemented
        theirs = other._tensors
        same = self._rest == other._rest and self._tensors.keys() == theirs.keys()
        return same and all(torch.equal(tensor, theirs[name]) for name, tensor in self._tensors.items())

    __hash__ = None  # type: ignore[assignment]


def read(kind: str, path: Path) -> FinderFile:
    """Read a file of one of ``KINDS``, as a user of the package does."""
    if kind == "profile":
        profile = Profile.load(path)
        tensors = {"change": profile.change, "size": profile.size, "growth": profile.growth}
        rest = (profile.work, profile.sites, profile.branches, profile.loop, profile.model)
        return FinderFile(tensors, rest, profile.save)
    learner = _learner()
    learner.restore(path)
    checkpoint = learner.checkpoint()
    return FinderFile(checkpoint.tensors, (checkpoint.run, checkpoint.round), checkpoint.save)


def valid_files(folder: Path) -> dict[str, bytes]:
    """Return a small valid file of every kind; ``folder`` is for what is written on the way."""
    generator = torch.Generator().manual_seed(0)
    change, size, growth = (torch.rand(*shape, 3, 2, generator=generator) for shape in ((2, 2), (2,), (2,)))
    sites = tuple(map(Site.parse, ("blocks.0.attn", "delta(mid)")))
    work = Work((100, 100, 90), dict.fromkeys(sites, (20, 20, 10)))
    Profile(change, size, growth, work, sites, 1, {"name": "ddim"}, {"class": "DiT"}).save(folder / "profile")
    learner = _learner()
    # So that the optimiser has moments, and one evaluation has none.
    learner.update({1: learner.logits.scores(1).square().sum()})
    learner.finish_round()
    learner.checkpoint().save(folder / "checkpoint")
    return {kind: (folder / kind).read_bytes() for kind in KINDS}


@cache
def _learner() -> Learner:
    """Return the one learner of this process, into which every checkpoint is read."""
    torch.manual_seed(0)
    denoiser = OpenDenoiser(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval(), _SITES)

    def loop(model: nn.Module, noise: Tensor) -> Tensor:
        for _ in range(_NUM_EVALUATIONS):
            noise = model(noise)
        return noise

    evaluations = denoiser.evaluations_of(loop, torch.ones(1, 4), {})
    return Learner(denoiser, evaluations, [1, 3], Settings(budget=0.9), Workers(), 1.0)
