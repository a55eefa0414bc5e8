"""A loop may keep a state that changes nothing; what changes the denoiser or its own next run is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from l2c_compile import CacheSchedule, l2c_compile
from l2c_compile.errors import LoopTraceError
from tests.tiny import Residual, at, draw, residual, same_bits

LOG: list[int] = []
GENERATOR = np.random.default_rng(0)


class Scheduler:
    """A multistep sampler as diffusers has them: it keeps the last outputs, and begins anew in ``set_timesteps``."""

    def __init__(self) -> None:
        self.outputs: list[Any] = [None]
        self.index: Any = None
        self.num_steps: Any = None
        self.timesteps = torch.zeros(0)

    def set_timesteps(self, num_steps: int) -> None:
        self.num_steps, self.index, self.outputs = num_steps, 0, [None]
        self.timesteps = torch.arange(num_steps, dtype=torch.float32)

    def step(self, h: Tensor, x: Tensor) -> Tensor:
        before, self.outputs = self.outputs[-1], [h]
        self.index += 1
        return x - 0.1 * h if before is None else x - 0.1 * (2 * h - before)


SCHEDULER = Scheduler()


def keeps_a_scheduler(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    SCHEDULER.set_timesteps(3)
    for t in SCHEDULER.timesteps:
        x = SCHEDULER.step(denoiser(x, t.expand(x.shape[0])), x)
    return x


def begins_where_it_ended(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    for i in range(3):
        x = SCHEDULER.step(denoiser(x, at(x, i)), x) if SCHEDULER.index is not None else x - denoiser(x, at(x, i))
    SCHEDULER.index = 0
    return x


def logs(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    for i in range(3):
        x = x - 0.1 * denoiser(x, at(x, i))
        LOG.append(i)
    return x


def draws_with_numpy(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    for i in range(3):
        x = x - np.random.rand() * denoiser(x, at(x, i))
    return x


def draws_from_a_generator(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    for i in range(3):
        x = x - GENERATOR.random() * denoiser(x, at(x, i))
    return x


def seeds_and_forks(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    for i in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(i)
            x = x - 0.1 * denoiser(x, at(x, i)) + 0.1 * torch.randn_like(x)
    return x


def sets_an_attribute(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    for i in range(3):
        denoiser.a.scale = i
        x = x - 0.1 * denoiser(x, at(x, i))
    return x


def adds_a_hook(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    for i in range(3):
        x = x - 0.1 * denoiser(x, at(x, i))
        denoiser.a.register_forward_hook(lambda module, args, output: output * 2)
    return x


def swaps_weights(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    kept = denoiser.a.weight.detach().clone()
    with torch.no_grad():
        denoiser.a.weight.mul_(1.5)
    for i in range(3):
        x = x - 0.1 * denoiser(x, at(x, i))
    with torch.no_grad():
        denoiser.a.weight.copy_(kept)
    return x


def swaps_data(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    for i in range(3):
        denoiser.a.weight.data = denoiser.a.weight.data * 2
        x = x - 0.1 * denoiser(x, at(x, i))
    return x


def loads_weights(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    for i in range(3):
        denoiser.a.load_state_dict({name: value * 2 for name, value in denoiser.a.state_dict().items()})
        x = x - 0.1 * denoiser(x, at(x, i))
    return x


def swallows_a_refusal(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    for i in range(3):
        h = denoiser(x, at(x, i))
        scale = 0.1
        with suppress(ValueError):
            scale = 0.2 if h.sum() > 0 else 0.3
        x = x - scale * h
    return x


REFUSED = {
    begins_where_it_ended: r"the loop changes its own state",
    logs: r"the loop changes its own state in every call \('global LOG\.length' was 3 and is 6",
    draws_with_numpy: r"seeds the random number generator of numpy\.random, or draws from it",
    draws_from_a_generator: r"'global GENERATOR\.position'",
    seeds_and_forks: r"seeds the random number generator of torch, or puts back a state .*test_loop_effects\.py:\d+",
    sets_an_attribute: r"changes the denoiser before evaluation 1: 'denoiser\.a\.scale' was 0 and is 1",
    adds_a_hook: r"changes the denoiser before evaluation 1: 'denoiser\.a\._forward_hooks",
    swaps_weights: r"changes the weight 'a\.weight' of the denoiser at .*swap them in before the sampler is called",
    swaps_data: r"changes the weight 'a\.weight' of the denoiser",
    loads_weights: r"changes the weight 'a\.weight' of the denoiser",
    swallows_a_refusal: r"branches on a value made from the latent",
}


@pytest.mark.parametrize("loop", REFUSED)
def test_what_a_graph_cannot_hold_is_refused_and_put_back(loop: Callable[..., Tensor]) -> None:
    model = residual()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    memory = model.a.weight.data_ptr()
    numbers = random.getstate(), repr(np.random.get_state()), torch.get_rng_state()
    sampler = l2c_compile(model, CacheSchedule.all_compute(3, ["a"]), loop, check="structure")
    with pytest.raises(LoopTraceError, match=REFUSED[loop]):
        sampler(draw(2, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.a.weight.data_ptr() == memory
    assert not hasattr(model.a, "scale")
    assert not model.a._forward_hooks
    assert (LOG, SCHEDULER.index) == ([], None)
    assert (random.getstate(), repr(np.random.get_state())) == numbers[:2]
    assert torch.equal(torch.get_rng_state(), numbers[2])


def test_a_scheduler_that_begins_anew_is_taken_and_left_as_it_was() -> None:
    model, noise = residual(), draw(2, 4)
    before = dict(vars(SCHEDULER))
    sampler = l2c_compile(model, CacheSchedule.all_compute(3, ["a"]), keeps_a_scheduler, check="structure")
    got, again = sampler(noise), sampler(draw(3, 4))
    assert vars(SCHEDULER) == before
    with torch.no_grad():
        assert same_bits(got, keeps_a_scheduler(model, noise))
        assert same_bits(again, keeps_a_scheduler(model, draw(3, 4)))
    SCHEDULER.__init__()  # type: ignore[misc]


def test_a_timestep_that_is_written_through_numpy_or_data_is_taken_as_it_is_at_each_use() -> None:
    def writes(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        through_numpy, through_data = torch.zeros(2), torch.zeros(2)
        for i in range(3):
            through_numpy.numpy().fill(i)
            through_data.data.fill_(i)
            x = x - 0.1 * denoiser(x, through_numpy) + 0.1 * denoiser(x, through_data + 0)
        return x

    model, noise = residual(), draw(2, 4)
    got = l2c_compile(model, CacheSchedule.all_compute(6, ["a"]), writes, check="structure")(noise)
    with torch.no_grad():
        assert same_bits(got, writes(model, noise))


def test_a_list_that_the_loop_is_given_may_not_be_written_to() -> None:
    def collects(denoiser: Any, x: Tensor, seen: list[Tensor]) -> Tensor:  # noqa: ANN401
        for i in range(2):
            x = x - 0.1 * denoiser(x, at(x, i))
            seen.append(x)
        return x

    seen: list[Tensor] = []
    with pytest.raises(LoopTraceError, match="changes a list or a dict that it is given"):
        l2c_compile(residual(), CacheSchedule.all_compute(2, ["a"]), collects)(draw(2, 4), seen=seen)
    assert seen == []


def test_what_the_denoiser_stored_is_not_there_for_the_loop() -> None:
    features: dict[str, Tensor] = {}

    class Stores(Residual):
        def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            h = super().forward(*args, **kwargs)
            features["h"] = h
            return h

    def reads(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        for i in range(2):
            x = x - 0.1 * denoiser(x, at(x, i)) + features["h"]
        return x

    with pytest.raises(LoopTraceError, match=r"KeyError: 'h'.*what the denoiser stored during its call"):
        l2c_compile(Stores(), CacheSchedule.all_compute(2, ["a"]), reads)(draw(2, 4))
