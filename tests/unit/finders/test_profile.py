"""Profiles against plain forward hooks; work against the compiled graph; files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from l2c_compile.errors import FileFormatError, ProfileError, UnknownSiteError
from l2c_compile.finders import Profile, take_profile
from l2c_compile.finders.profile import FORMAT, VERSION
from l2c_compile.loops import DDIM, Guidance
from tests.tiny import at, draw, residual, seeded, steps, tiny_dit, tiny_uvit

# float32 sums of a few hundred numbers in another order, then one more rounding each: far below this.
RTOL = 64 * torch.finfo(torch.float32).eps


def hooked_values(
    model: nn.Module, paths: list[str], loop: Callable[..., object], noise: Tensor, **conditions: object
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return (first input, output) of each module at each evaluation."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _, args, out, path=path: seen[path].append((args[0].clone(), out.clone()))
        )
        for path in paths
    ]
    with torch.no_grad():
        loop(model, noise, **conditions)
    for handle in handles:
        handle.remove()
    return seen


def check_against_hooks(
    profile: Profile, run: int, values: dict[str, list[tuple[Tensor, Tensor]]], branches: int = 1
) -> None:
    for column, site in enumerate(profile.sites):
        begins, ends = values[site.path], values[site.last or site.path]
        held = [after.double() for _, after in ends]
        if site.kind == "delta":
            # Subtracted in the precision of the model, as in the graph.
            held = [(after - before).double() for (before, _), (_, after) in zip(begins, ends, strict=True)]
        assert len(held) == profile.num_evaluations
        for e, value in enumerate(held):
            close(profile.size[run, e, column], value.abs().sum())
            for k in range(1, profile.num_lags + 1):
                earlier = held[e - k * branches] if e >= k * branches else value
                close(profile.change[run, k - 1, e, column], (value - earlier).abs().sum(), value)
            ratio = torch.ones(())
            if e >= branches:
                ratio = (value.norm(dim=-1) / held[e - branches].norm(dim=-1)).mean()
            close(profile.growth[run, e, column], ratio)


def close(got: Tensor, wanted: Tensor, of: Tensor | None = None) -> None:
    """Compare; a difference of values ``of`` this size is off by the rounding of the values."""
    atol = 0.0 if of is None else RTOL * float(of.abs().sum())
    torch.testing.assert_close(got.double(), wanted.double(), rtol=RTOL, atol=atol)


def test_the_statistics_are_those_that_hooks_give() -> None:
    model = tiny_dit(depth=3)
    loop = DDIM(steps=5, guidance=Guidance(1.5, null={"y": 5}, channels=3))
    runs = [(draw(2, 4, 4, 4, seed=seed), {"y": torch.tensor([seed, 1])}) for seed in range(2)]
    sites = ["blocks.*.attn", "blocks.*.mlp", "blocks.1", "delta(blocks.0..blocks.2)", "blocks.0..blocks.2"]
    profile = take_profile(model, loop, sites, runs, lags=4)
    assert (profile.num_runs, profile.num_lags, profile.num_evaluations, len(profile.sites)) == (2, 4, 5, 9)
    paths = ["blocks.0", "blocks.1", "blocks.2", *(f"blocks.{i}.{name}" for i in range(3) for name in ("attn", "mlp"))]
    for run, (noise, conditions) in enumerate(runs):
        check_against_hooks(profile, run, hooked_values(model, paths, loop, noise, **conditions))
    assert profile.loop == loop.to_dict()
    assert profile.model["class"] == "DiT"


def test_with_branches_evaluations_are_compared_with_those_that_share_their_cache() -> None:
    model = tiny_uvit()
    loop = DDIM(steps=3, guidance=Guidance(0.4, null={"y": 5}, batched=False, base="cond"))
    noise, y = draw(1, 4, 4, 4), torch.tensor([2])
    profile = take_profile(model, loop, ["mid_block.attn", "mid_block.mlp"], [(noise, {"y": y})], lags=2, branches=2)
    assert (profile.num_evaluations, profile.branches) == (6, 2)
    values = hooked_values(model, ["mid_block.attn", "mid_block.mlp"], loop, noise, y=y)
    check_against_hooks(profile, 0, values, branches=2)


class Half(nn.Module):
    """A model in bfloat16 that returns a pair from one of its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Halves()
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a, b = self.pair(x)
        return torch.cat([b, a], dim=1) * t[:, None]


class Halves(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, dim=1)
        return a.sin(), b.cos()


def test_all_tensors_of_a_site_count_and_half_precision_is_summed_in_single() -> None:
    noise = draw(3, 512).bfloat16()
    loop = steps(3)
    profile = take_profile(Half(), loop, ["pair"], [(noise, {})], lags=1)
    seen: list[Tensor] = []
    model = Half()
    model.pair.register_forward_hook(lambda _, args, out: seen.append(torch.cat(out, dim=1).double()))
    loop(model, noise)
    for e, value in enumerate(seen):
        close(profile.size[0, e, 0], value.abs().sum())
        if e:
            close(profile.change[0, 0, e, 0], (value - seen[e - 1]).abs().sum(), value)


def test_a_loop_may_write_into_what_it_gets_and_ask_the_denoiser_for_its_attributes() -> None:
    def loop(denoiser: Any, noise: Tensor) -> Tensor:  # noqa: ANN401
        x = noise.clone()
        for t in range(3):
            prediction = denoiser.eval()(x, at(x, t + 1.0))
            x -= prediction.mul_(0.1) * denoiser.norm.weight.shape[0]
        return x

    model, noise = residual(), draw(2, 4)
    # Holds the latent itself, which the loop goes on to write into.
    model.first = nn.Identity()
    model.norm.register_forward_pre_hook(lambda module, args: (model.first(args[0]),))
    profile = take_profile(model, loop, ["b", "first"], [(noise, {})], lags=2)
    check_against_hooks(profile, 0, hooked_values(model, ["b", "first"], loop, noise))
    assert profile.loop is None


def test_only_as_many_evaluations_are_kept_as_there_are_lags(monkeypatch: pytest.MonkeyPatch) -> None:
    from l2c_compile.finders import profile as module

    most = 0
    note = module._RunStatistics.note

    def counting(self: Any, *arguments: Any) -> None:  # noqa: ANN401
        nonlocal most
        note(self, *arguments)
        most = max(most, len(self._kept))

    monkeypatch.setattr(module._RunStatistics, "note", counting)
    take_profile(residual(), steps(9), ["a"], [(draw(2, 4), {})], lags=2)
    assert most == 2


@pytest.fixture(scope="module")
def small() -> Profile:
    loop = DDIM(steps=3)
    return take_profile(tiny_dit(), loop, ["blocks.*.attn"], [(draw(1, 4, 4, 4), {"y": torch.tensor([1])})], lags=2)


def test_a_saved_profile_is_loaded_again(tmp_path: Path, small: Profile) -> None:
    small.save(tmp_path / "p.safetensors")
    loaded = Profile.load(tmp_path / "p.safetensors")
    for name in ("change", "size", "growth"):
        assert torch.equal(getattr(loaded, name), getattr(small, name))
    for name in ("work", "sites", "branches", "loop", "model"):
        assert getattr(loaded, name) == getattr(small, name)


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: d.update(format="l2c_compile.router"), f"a profile wants format '{FORMAT}'"),
        (lambda d, t: d.update(version=VERSION + 1), "reads up to 1; update l2c_compile"),
        (lambda d, t: d.update(version="1"), "wants a version number"),
        (lambda d, t: d.update(orientation="clean"), "orientation wants 'execution'"),
        (lambda d, t: d.update(sites=["blocks.0.attn"]), r"site_work wants shape \(1, 3\), got \(2, 3\)"),
        (lambda d, t: d.update(sites=["a", "a"]), "wants its evaluations and sites|wants 2 different sites"),
        (lambda d, t: d.update(sites=[1, 2]), "sites wants a list of site names"),
        (lambda d, t: d.update(branches=0), "branches wants a number from 1 to 3, got 0"),
        (lambda d, t: d.update(model=[]), "loop and model want objects"),
        (lambda d, t: t["size"].fill_(float("nan")), "size of site blocks.0.attn at evaluation 0 wants a finite"),
        (lambda d, t: t["change"].neg_(), "change of site .* wants a finite number from 0"),
        (lambda d, t: t.update(change=t["change"][0]), r"change wants shape \(runs, lags, evaluations, sites\)"),
        (lambda d, t: t.update(growth=t["growth"][:, 1:].contiguous()), r"growth wants shape \(1, 3, 2\)"),
        (lambda d, t: t.update(size=t["size"].double()), "size wants a float32 tensor"),
        (lambda d, t: t.update(site_work=t["site_work"].neg()), "want numbers from 0"),
        (lambda d, t: t.update(site_work=t["site_work"].float()), "want whole numbers"),
        (lambda d, t: t.pop("size"), "a profile file wants the tensors change, "),
    ],
)
def test_a_file_that_was_changed_is_refused(tmp_path: Path, small: Profile, change: Change, message: str) -> None:
    path = tmp_path / "p.safetensors"
    small.save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["l2c_compile"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(document, tensors)
    safetensors.torch.save_file(tensors, path, {"l2c_compile": json.dumps(document)})
    with pytest.raises(FileFormatError, match=message):
        Profile.load(path)


def test_what_is_no_profile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    path.write_bytes(b"no profile")
    with pytest.raises(FileFormatError, match="not a safetensors file"):
        Profile.load(path)
    safetensors.torch.save_file({"scores": torch.ones(2)}, path)
    with pytest.raises(FileFormatError, match="a profile file wants the tensors"):
        Profile.load(path)


def test_a_model_that_overflows_is_refused() -> None:
    model = seeded(residual(), std=1e30)
    with pytest.raises(ProfileError, match=r"site b holds NaN or infinity at evaluation 0; check the model"):
        take_profile(model, steps(2), ["b"], [(1e30 * draw(2, 4), {})])


def test_runs_of_different_shape_are_refused() -> None:
    with pytest.raises(ProfileError, match="the runs of a profile want the same evaluations"):
        take_profile(residual(), steps(2), ["b"], [(draw(2, 4), {}), (draw(3, 4), {})])


def test_evaluations_that_cannot_be_compared_are_refused() -> None:
    def loop(denoiser: Any, noise: Tensor) -> Tensor:  # noqa: ANN401
        first = denoiser(noise, at(noise, 1))
        both = torch.cat([first, first])
        return denoiser(both, at(both, 2))  # type: ignore[no-any-return]

    with pytest.raises(ProfileError, match=r"site b, evaluation 1: holds \[\(4, 4\)\] where .* held \[\(2, 4\)\]"):
        take_profile(residual(), loop, ["b"], [(draw(2, 4), {})])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"runs": []}, "at least one run"),
        ({"sites": []}, "at least one site"),
        ({"lags": 0}, "lags and branches of at least 1"),
        ({"branches": 0}, "lags and branches of at least 1"),
    ],
)
def test_a_profile_of_nothing_is_refused(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"sites": ["b"], "runs": [(draw(2, 4), {})], **arguments}
    with pytest.raises(ProfileError, match=message):
        take_profile(residual(), steps(2), **given)


def test_a_site_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(UnknownSiteError, match="no module 'c'"):
        take_profile(residual(), steps(2), ["c"], [(draw(2, 4), {})])
