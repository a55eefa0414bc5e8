"""The base class of all loops.

A loop is a callable ``loop(denoiser, noise, **conditions) -> latent``. It runs eagerly as it stands, and it can be
traced: every number that depends on the sampler's schedule alone is a Python number before the first evaluation, and no
Python decision looks at the values of a latent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from l2c_compile.errors import LoopError, nearest
from l2c_compile.loops.guidance import Denoiser, Guidance, evaluate
from l2c_compile.loops.noise_schedules import BetaSchedule

_T = TypeVar("_T")


@dataclass(frozen=True)
class BuiltInLoop(ABC):
    """A sampler with all its settings; two loops with equal settings are equal."""

    name: ClassVar[str]
    """The name of the loop in its description."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, noise: Tensor, **conditions: object) -> Tensor:
        """Sample a batch of latents.

        Args:
            denoiser: the model, called as ``denoiser(x, t_B, **conditions)``.
            noise: standard normal latents, shape (B, C, ...), of a floating dtype.
            **conditions: the arguments that are passed to the denoiser by name, for example ``y=labels``.

        Returns:
            Clean latents in the shape and dtype of ``noise``.
        """

    @property
    @abstractmethod
    def network_timesteps(self) -> tuple[float, ...]:
        """The timestep of each guided prediction, in execution order."""

    @property
    @abstractmethod
    def network_noise_levels(self) -> tuple[tuple[float, float], ...]:
        """The factors of signal and noise in the latent of each guided prediction, in execution order."""

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The timestep of each evaluation, that is of each denoiser call, in execution order."""
        return tuple(t for t in self.network_timesteps for _ in range(self._num_calls))

    @property
    def noise_levels(self) -> tuple[tuple[float, float], ...]:
        """The factors of signal and noise in the latent of each evaluation, in execution order."""
        return tuple(level for level in self.network_noise_levels for _ in range(self._num_calls))

    @property
    def _num_calls(self) -> int:
        guidance: Guidance | None = getattr(self, "guidance", None)
        return guidance.num_calls if guidance else 1

    @property
    def num_evaluations(self) -> int:
        """The number of denoiser calls; unbatched guidance makes two for each prediction."""
        return len(self.timesteps)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able description of the loop, which ``loop_from_dict`` reads."""
        description: dict[str, Any] = {"name": self.name}
        for item in filter(_is_setting, fields(self)):
            value = getattr(self, item.name)
            if isinstance(value, Guidance):
                value = value.to_dict()
            if isinstance(value, BetaSchedule):
                value = dict(vars(value))
            description[item.name] = value
        return description

    @classmethod
    def from_dict(cls: type[_T], description: Mapping[str, Any]) -> _T:
        """Return the loop of a description; ``loop_from_dict`` also finds the class.

        Raises:
            LoopError: if a field is unknown, missing or makes no sense.
        """
        values = {name: value for name, value in description.items() if name != "name"}
        if isinstance(values.get("guidance"), Mapping):
            values["guidance"] = _build(Guidance, values["guidance"])
        if isinstance(values.get("betas"), Mapping):
            values["betas"] = _build(BetaSchedule, values["betas"])
        return _build(cls, values)

    def _predict(self, denoiser: Denoiser, x: Tensor, timestep: float, conditions: Mapping[str, Any]) -> Tensor:
        """Return the prediction, with guidance if the loop has it."""
        guidance: Guidance | None = getattr(self, "guidance", None)
        if guidance is None:
            return evaluate(denoiser, x, timestep, conditions)
        return guidance.evaluate(denoiser, x, timestep, conditions)

    def _check_parts(self) -> None:
        """Raise LoopError unless the fields ``guidance`` and ``betas`` are of their class."""
        guidance, betas = getattr(self, "guidance", None), getattr(self, "betas", BetaSchedule())
        if guidance is not None and not isinstance(guidance, Guidance):
            raise LoopError(f"guidance wants a Guidance or None, got {guidance!r}")
        if not isinstance(betas, BetaSchedule):
            raise LoopError(f"betas wants a BetaSchedule, got {betas!r}")


def check_count(what: str, value: object, minimum: int = 1) -> None:
    """Raise LoopError unless ``value`` is an int of at least ``minimum``."""
    if type(value) is not int or value < minimum:
        raise LoopError(f"{what} must be an integer of at least {minimum}, got {value!r}")


def check_number(what: str, value: object, *, above: float = -float("inf"), at_least: float = -float("inf")) -> None:
    """Raise LoopError unless ``value`` is a finite number in the given range."""
    finite = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
    if not finite or not (value > above and value >= at_least):  # type: ignore[operator]
        bound = f" above {above:g}" if above > at_least else f" of at least {at_least:g}"
        raise LoopError(f"{what} must be a number{bound}, got {value!r}")


def _is_setting(item: Field[Any]) -> bool:
    # A field that is not given to the constructor follows from the others.
    return item.init


def _build(cls: type[_T], values: Mapping[str, Any]) -> _T:
    """Make a dataclass, with errors that name unknown and missing fields."""
    known: dict[str, Field[Any]] = {item.name: item for item in fields(cls) if _is_setting(item)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            hint = nearest(name, known) or f"known: {', '.join(known)}"
            raise LoopError(f"{cls.__name__} has no field {name!r}; {hint}")
    missing = [name for name, item in known.items() if item.default is MISSING and name not in values]
    if missing:
        raise LoopError(f"the description of a {cls.__name__} lacks {', '.join(missing)}")
    return cls(**values)
