"""The loop as one CUDA graph, with a recorder that records nothing but what it is asked for: there need be no GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile, load
from l2c_compile.backends import lower as backend_module
from l2c_compile.backends.cuda_graphs import CudaRecorder, RecordedLoop, check_capturable
from l2c_compile.errors import BackendError
from l2c_compile.graphs.loop_graph import LoopGraph
from tests.tiny import draw, residual, same_bits, steps

SCHEDULE = CacheSchedule.from_table({"a": [1, 0, 1], "b": [1, 0, 0]})


class FakeRecorder:
    """Replays by running again into the results of the recording, as a CUDA graph writes the same memory again."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.log: list[str] = []

    def warm_up(self, run: Callable[[], object]) -> None:
        self.log.append("warm up")
        run()

    def record(self, run: Callable[[], Sequence[object]]) -> tuple[Callable[[], None], Sequence[object]]:
        self.log.append("record")
        assert not torch.is_inference_mode_enabled()
        results = [result.clone() if isinstance(result, Tensor) else result for result in run()]

        def replay() -> None:
            self.log.append("replay")
            for own, new in zip(results, run(), strict=True):
                if isinstance(own, Tensor):
                    own.copy_(new)  # type: ignore[arg-type]

        return replay, results

    def drain(self) -> None:
        self.log.append("drain")

    def wait_for_last(self) -> None:
        self.log.append("wait")

    def mark_end(self) -> None:
        self.log.append("end")


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[FakeRecorder]:
    """Let samplers on a CPU record, with fakes; return them as they are made."""
    made: list[FakeRecorder] = []

    def make(device: torch.device) -> FakeRecorder:
        made.append(FakeRecorder(device))
        return made[-1]

    monkeypatch.setattr(backend_module, "CudaRecorder", make)
    monkeypatch.setattr(backend_module, "check_capturable", lambda graph: torch.device("cpu"))
    return made


def compiled(**options: Any) -> CompiledSampler:  # noqa: ANN401
    return l2c_compile(residual(), SCHEDULE, steps(3), **options)


def recorded(**options: Any) -> CompiledSampler:  # noqa: ANN401
    return compiled(mode="reduce-overhead", **options)


def test_a_loop_is_recorded_once_and_replayed_in_every_call(recorders: list[FakeRecorder]) -> None:
    sampler, plain = recorded(), compiled()
    for seed in range(3):
        noise = draw(2, 4, seed=seed)
        assert same_bits(sampler(noise), plain(noise))
    (recorder,) = recorders
    call = ["wait", "replay", "end"]
    assert recorder.log == ["wait", "warm up", "record", "replay", "end", *call, *call]


def test_what_was_returned_is_not_overwritten_by_the_next_call(recorders: list[FakeRecorder]) -> None:
    sampler = recorded()
    first = sampler(draw(2, 4, seed=1))
    assert isinstance(first, Tensor)
    before = first.clone()
    second = sampler(draw(2, 4, seed=2))
    assert torch.equal(first, before)
    assert not torch.equal(first, second)


def test_the_callers_noise_is_copied_not_read_later(recorders: list[FakeRecorder]) -> None:
    sampler, noise = recorded(), draw(2, 4)
    wanted = sampler(noise)
    copied = noise.clone()
    noise.zero_()
    assert same_bits(sampler(copied), wanted)
    noise.fill_(7.0)
    assert same_bits(sampler(copied), wanted)


def test_another_form_of_input_has_a_recording_of_its_own(recorders: list[FakeRecorder]) -> None:
    sampler, plain = recorded(), compiled()
    for batch in (2, 3, 2):
        assert same_bits(sampler(draw(batch, 4)), plain(draw(batch, 4)))
    assert [recorder.log.count("record") for recorder in recorders] == [1, 1]


def test_weights_changed_in_place_are_seen_and_replaced_ones_recorded_again(recorders: list[FakeRecorder]) -> None:
    sampler, plain = recorded(), compiled()
    sampler(draw(2, 4))
    (recorder,) = recorders
    with torch.no_grad():
        for each in (sampler, plain):
            each.model.a.weight.mul_(2)  # type: ignore[union-attr, operator]
            each.refresh()
    assert same_bits(sampler(draw(2, 4)), plain(draw(2, 4)))
    assert recorder.log.count("record") == 1
    for each in (sampler, plain):
        each.model.a.weight.data = draw(4, 4, seed=9)  # type: ignore[union-attr]
        each.refresh()
    assert same_bits(sampler(draw(2, 4)), plain(draw(2, 4)))
    assert recorder.log.count("record") == 2
    assert recorder.log.index("drain") < len(recorder.log) - recorder.log[::-1].index("record") - 1


def test_refreshed_constants_reach_the_recording(recorders: list[FakeRecorder]) -> None:
    sampler, plain = recorded(), compiled()
    sampler(draw(2, 4))
    plain(draw(2, 4))
    with torch.no_grad():
        for each in (sampler, plain):
            each.model.time.weight.add_(0.5)  # type: ignore[union-attr, operator]
            each.refresh()
    assert same_bits(sampler(draw(2, 4)), plain(draw(2, 4)))
    assert recorders[0].log.count("record") == 1


def test_the_first_call_may_be_under_inference_mode(recorders: list[FakeRecorder]) -> None:
    sampler, plain = recorded(), compiled()
    with torch.inference_mode():
        sampler(draw(2, 4))
    assert same_bits(sampler(draw(2, 4, seed=5)), plain(draw(2, 4, seed=5)))


def test_threads_take_turns(recorders: list[FakeRecorder]) -> None:
    sampler, plain = recorded(), compiled()
    noises = [draw(2, 4, seed=seed) for seed in range(8)]
    sampler.capture(noises[0])
    got: dict[int, object] = {}

    def sample(index: int) -> None:
        for _ in range(3):
            got[index] = sampler(noises[index])

    threads = [threading.Thread(target=sample, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, noise in enumerate(noises):
        assert same_bits(got[index], plain(noise))
    (recorder,) = recorders
    assert recorder.log.count("record") == 1
    # Never two calls at once: begins and ends alternate.
    ends = [entry for entry in recorder.log if entry in ("wait", "end")]
    assert ends == ["wait", "end"] * (len(ends) // 2)


def test_a_failed_recording_is_tried_again_and_returns_nothing_stale(recorders: list[FakeRecorder]) -> None:
    sampler, plain = recorded(), compiled()
    sampler(draw(2, 4))
    (recorder,) = recorders
    sampler.model.a.weight.data = draw(4, 4, seed=9)  # type: ignore[union-attr]
    plain.model.a.weight.data = draw(4, 4, seed=9)  # type: ignore[union-attr]
    sampler.refresh()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "record", lambda run: (_ for _ in ()).throw(BackendError("no")))
        for _ in range(2):
            with pytest.raises(BackendError, match="no"):
                sampler(draw(2, 4))
    assert same_bits(sampler(draw(2, 4)), plain(draw(2, 4)))


def test_verify_summary_and_torch_compile_work_on_a_recorded_sampler(recorders: list[FakeRecorder]) -> None:
    sampler = recorded()
    assert sampler.verify(draw(2, 4)).bitwise
    assert sampler.summary().rows
    run = sampler.capture(draw(2, 4)).run
    assert isinstance(run, RecordedLoop)
    assert run.num_recordings == 1
    whole = torch.compile(sampler, backend="eager", fullgraph=True)
    assert same_bits(whole(draw(2, 4)), sampler(draw(2, 4)))


def test_a_loaded_sampler_records(recorders: list[FakeRecorder], tmp_path: Any) -> None:  # noqa: ANN401
    sampler = compiled()
    wanted = sampler(draw(2, 4))
    sampler.save(tmp_path / "s.pt2")
    loaded = load(tmp_path / "s.pt2", mode="reduce-overhead")
    assert same_bits(loaded(draw(2, 4)), wanted)
    assert recorders[0].log.count("record") == 1


def test_on_a_cpu_the_mode_is_refused_by_name() -> None:
    wanted = r"mode='reduce-overhead' records a CUDA graph, .* an input is on cpu; .* or leave out mode"
    with pytest.raises(BackendError, match=wanted):
        recorded()(draw(2, 4))


@pytest.mark.parametrize("mode", ["max-autotune", "", "default"])
def test_another_mode_is_refused(mode: str) -> None:
    with pytest.raises(BackendError, match="mode wants 'reduce-overhead' or None, got"):
        compiled(mode=mode)


def loop_graph() -> LoopGraph:
    sampler = compiled()
    return sampler.capture(draw(2, 4)).graph.copy()


def test_what_is_not_on_the_one_cuda_device_is_named() -> None:
    graph = loop_graph()
    for node in graph.graph.nodes:
        if isinstance(node.meta.get("val"), Tensor):
            node.meta["val"] = fake(node.meta["val"], "cuda:0")
    assert check_capturable(graph) == torch.device("cuda:0")
    inside = next(node for node in graph.graph.nodes if node.meta.get("evaluation") == 1)
    inside.meta["val"] = fake(inside.meta["val"], "cuda:1")
    with pytest.raises(BackendError, match=f"'{inside.name}' of evaluation 1 is on cuda:1, while .* on cuda:0"):
        check_capturable(graph)


def fake(value: Tensor, device: str) -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def test_the_recorder_of_cuda_has_the_form_that_the_loop_wants() -> None:
    names = {name for name in dir(FakeRecorder) if not name.startswith("_")}
    assert names <= set(dir(CudaRecorder))
