"""Threads and processes: samplers wait while another thread captures; forks and spawned processes sample, too."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile, run_reference
from tests.forked import needs_fork, run_in_fork
from tests.tiny import draw, residual, steps
from tests.waiting import HANG_S, num_blocked, wait_until

pytestmark = pytest.mark.usefixtures("captured_anew")

NUM_EVALUATIONS = 3


def compiled(backend: str = "eager") -> CompiledSampler:
    schedule = CacheSchedule.from_table({"a": [1, 0, 1], "b": [1, 0, 0]})
    return l2c_compile(residual(), schedule, steps(NUM_EVALUATIONS), backend=backend)


def expected(sampler: CompiledSampler, noise: Tensor) -> Tensor:
    result = run_reference(sampler.model, sampler.loop, sampler.schedule, noise.clone(), {})
    assert isinstance(result, Tensor)
    return result


def run_together(*jobs: Callable[[], None]) -> None:
    """Run the jobs in threads that start at once; the first error of any is raised."""
    barrier = threading.Barrier(len(jobs))

    def run(job: Callable[[], None]) -> None:
        barrier.wait()
        job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        for done in [pool.submit(run, job) for job in jobs]:
            done.result(HANG_S)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_threads_share_one_sampler_and_capture_forms_while_others_sample(backend: str) -> None:
    sampler = compiled(backend)
    inputs = {batch: draw(batch, 4, seed=batch) for batch in range(1, 5)}
    wanted = {batch: expected(sampler, noise) for batch, noise in inputs.items()}
    sampler.capture(inputs[1])

    def sample(first: int) -> Callable[[], None]:
        def job() -> None:
            for turn in range(4):
                # The form that is there already, and a new one in between.
                for batch in (1, 1 + (first + turn) % 4):
                    with torch.no_grad():
                        result = sampler(inputs[batch])
                    torch.testing.assert_close(result, wanted[batch], rtol=0, atol=0)

        return job

    run_together(*(sample(first) for first in range(4)))
    assert len(sampler._forms) == 4


def test_a_form_that_two_threads_want_is_built_once() -> None:
    stages: list[str] = []
    schedule = CacheSchedule.from_table({"a": [1, 0, 1]})
    sampler = l2c_compile(residual(), schedule, steps(3), progress=stages.append)

    def capture() -> None:
        sampler.capture(draw(2, 4))

    run_together(capture, capture, capture)
    assert stages.count("trace the loop") == 1


def test_a_sampler_waits_while_another_sampler_of_the_model_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled()
    second = l2c_compile(first.model, first.schedule, first.loop)
    noise = draw(2, 4)
    wanted = first(noise)
    inside, go_on = threading.Event(), threading.Event()
    export = torch.export.export

    def slow_export(*args: object, **kwargs: object) -> object:
        inside.set()
        assert go_on.wait(HANG_S)
        return export(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.export, "export", slow_export)
    with ThreadPoolExecutor(2) as pool:
        capturing = pool.submit(second.capture, noise)
        assert inside.wait(HANG_S)
        sampling = pool.submit(first, noise)
        wait_until(lambda: num_blocked() == 1 or sampling.done())
        assert not sampling.done()
        go_on.set()
        assert torch.equal(sampling.result(HANG_S), wanted)
        capturing.result(HANG_S)


def test_a_captured_form_runs_while_the_rest_of_another_capture_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = compiled()
    wanted = sampler(draw(2, 4))
    inside, go_on = threading.Event(), threading.Event()

    def progress(stage: str) -> None:
        if stage == "simplify":
            inside.set()
            assert go_on.wait(HANG_S)

    sampler._progress = progress
    with ThreadPoolExecutor(1) as pool:
        capturing = pool.submit(sampler.capture, draw(3, 4))
        assert inside.wait(HANG_S)
        assert torch.equal(sampler(draw(2, 4)), wanted)
        go_on.set()
        capturing.result(HANG_S)


def _sample_twice(sampler: CompiledSampler, noise: Tensor) -> list[object]:
    """Sample with a form that the parent captured, and with one that only the child has."""
    return [sampler(noise).tolist(), sampler(noise[:1]).tolist()]


@needs_fork
def test_a_forked_child_samples_and_captures() -> None:
    sampler, noise = compiled(), draw(2, 4)
    wanted = [sampler(noise).tolist(), expected(sampler, noise[:1]).tolist()]
    assert run_in_fork(_sample_twice, sampler, noise) == wanted


@needs_fork
def test_a_child_forked_while_threads_sample_and_capture_does_not_hang() -> None:
    sampler, noise = compiled(), draw(2, 4)
    wanted = [sampler(noise).tolist(), expected(sampler, noise[:1]).tolist()]
    stop = threading.Event()

    def busy() -> None:
        batch = 3
        while not stop.is_set():
            sampler(draw(batch, 4))
            batch += 1

    worker = threading.Thread(target=busy)
    worker.start()
    try:
        for _ in range(2):
            assert run_in_fork(_sample_twice, sampler, noise) == wanted
    finally:
        stop.set()
        worker.join(HANG_S)


def three_steps(denoiser: Callable[[Tensor, Tensor], Tensor], noise: Tensor) -> Tensor:
    return steps(NUM_EVALUATIONS)(denoiser, noise)  # type: ignore[return-value]


def test_a_pickled_sampler_samples_alike() -> None:
    # What a spawned process is given.
    sampler = l2c_compile(residual(), CacheSchedule.from_table({"a": [1, 0, 1]}), three_steps)
    noise = draw(2, 4)
    wanted = sampler(noise)
    assert torch.equal(pickle.loads(pickle.dumps(sampler))(noise), wanted)
    assert torch.equal(copy.deepcopy(sampler)(noise), wanted)
