"""Classifier-free guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from l2c_compile.errors import LoopError
from l2c_compile.loops import (
    DDIM,
    Guidance,
)
from tests.toy_denoisers import toy, toy_inputs

# guidance


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("base", ["uncond", "cond"])
def test_batched_guidance_equals_two_calls(channels: int | None, base: str) -> None:
    noise, y = toy_inputs()
    settings: dict[str, Any] = {"channels": channels, "base": base}
    one, two = (Guidance(2.5, {"y": 10}, batched=batched, **settings) for batched in (True, False))
    torch.testing.assert_close(DDIM(5, guidance=one)(toy, noise, y=y), DDIM(5, guidance=two)(toy, noise, y=y))


def test_guidance_combines_as_published() -> None:
    x, y = toy_inputs()
    cond, uncond = (toy(x, torch.full((3,), 7.0), label)[:, :4] for label in (y, torch.full_like(y, 10)))
    dit = Guidance(2.5, {"y": 10}).evaluate(toy, x, 7.0, {"y": y})
    uvit = Guidance(2.5, {"y": 10}, base="cond").evaluate(toy, x, 7.0, {"y": y})
    torch.testing.assert_close(dit, uncond + 2.5 * (cond - uncond))
    torch.testing.assert_close(uvit, cond + 2.5 * (cond - uncond))


def test_guidance_of_the_first_channels_keeps_the_conditional_others() -> None:
    x, y = toy_inputs()
    everywhere = Guidance(2.5, {"y": 10}).evaluate(toy, x, 7.0, {"y": y})
    first = Guidance(2.5, {"y": 10}, channels=3).evaluate(toy, x, 7.0, {"y": y})
    torch.testing.assert_close(first[:, :3], everywhere[:, :3])
    torch.testing.assert_close(first[:, 3:], toy(x, torch.full((3,), 7.0), y)[:, 3:4])


def test_guidance_calls_the_conditional_half_first() -> None:
    x, y = toy_inputs()
    seen: list[list[int]] = []

    def denoiser(x: Tensor, t_B: Tensor, y: Tensor) -> Tensor:
        assert x.shape[0] == t_B.shape[0] == y.shape[0]
        seen.append(y.tolist())
        return x

    DDIM(1, spacing="trailing", guidance=Guidance(2.0, {"y": 9}))(denoiser, x, y=y)
    DDIM(1, spacing="trailing", guidance=Guidance(2.0, {"y": 9}, batched=False))(denoiser, x, y=y)
    assert seen == [[1, 5, 7, 9, 9, 9], [1, 5, 7], [9, 9, 9]]


@pytest.mark.parametrize("batched", [True, False])
def test_tensor_nulls_are_expanded_and_other_conditions_are_shared(batched: bool) -> None:
    x, _ = toy_inputs()
    text, null, mask = torch.randn(3, 2, 6), torch.zeros(2, 6), torch.randn(3, 1, 1, 1)

    def denoiser(x: Tensor, t_B: Tensor, text: Tensor, mask: Tensor, factor: float) -> Tensor:
        return factor * (x * mask + text.sum((1, 2))[:, None, None, None])

    guidance = Guidance(3.0, {"text": null}, batched=batched)
    got = guidance.evaluate(denoiser, x, 1, {"text": text, "mask": mask, "factor": 2.0})
    torch.testing.assert_close(got, 2.0 * (x * mask + 3.0 * text.sum((1, 2))[:, None, None, None]))


def test_guidance_that_does_not_fit_the_conditions_is_refused() -> None:
    x, y = toy_inputs()
    with pytest.raises(LoopError, match=r"null for condition 'label'.*called with: y"):
        DDIM(2, guidance=Guidance(2.0, {"label": 9}))(toy, x, y=y)
    with pytest.raises(LoopError, match=r"cannot double condition 'extra' of type dict.*batched=False"):
        DDIM(2, guidance=Guidance(2.0, {"y": 9}))(toy, x, y=y, extra={"a": y})
