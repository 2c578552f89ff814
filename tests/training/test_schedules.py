"""Schedules by their numbers, budgets by a clock of the test's own."""

import itertools
import json
import math
import pickle

import pytest

from albert_fast.training.schedules import (
    BatchRamp,
    Budget,
    Constant,
    Cosine,
    Exponential,
    LengthStages,
    Polynomial,
    StableDecay,
    Warmup,
    albert,
    warmup_stable_decay,
)


def test_albert():
    rate, budget = albert(), Budget(steps=125000)
    rates = {}
    for step in (0, 1, 3124, 3125, 62500, 124999, 125000):
        budget.step = step
        rates[step] = 1.76e-3 * rate(budget.progress)
    assert rates[0] == 0
    assert rates[1] == pytest.approx(1.76e-3 / 3125, rel=1e-12)
    assert rates[3124] == pytest.approx(1.75944e-3, abs=5e-9)
    assert rates[3125] == pytest.approx(1.71600e-3, rel=1e-12)
    assert rates[62500] == pytest.approx(0.88e-3, rel=1e-12)
    assert rates[124999] == pytest.approx(1.76e-3 / 125000, rel=1e-9)
    assert rates[125000] == 0


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (Constant(), {0: 1, 0.3: 1, 1: 1}),
        (Polynomial(), {0: 1, 0.25: 0.75, 1: 0}),
        (Polynomial(power=2), {0: 1, 0.5: 0.25, 1: 0}),
        (Polynomial(power=2, floor=0.2), {0: 1, 0.5: 0.4, 1: 0.2}),
        (Exponential(0.01), {0: 1, 0.5: 0.1, 1: 0.01}),
        (Cosine(), {0: 1, 1 / 3: 0.75, 0.5: 0.5, 1: 0}),
        (Cosine(floor=0.1), {0: 1, 0.5: 0.55, 1: 0.1}),
        (StableDecay(0.2), {0: 1, 0.8: 1, 0.9: 0.5, 1: 0}),
        (StableDecay(0.2, floor=0.1), {0.8: 1, 0.9: 0.55, 1: 0.1}),
        (StableDecay(0.2, shape="sqrt"), {0.8: 1, 0.85: 0.5, 1: 0}),
        (Warmup(0, Polynomial()), {0: 1, 1: 0}),
        (Warmup(0.2, Cosine()), {0: 0, 0.1: 0.5, 0.2: (1 + math.cos(0.2 * math.pi)) / 2, 1: 0}),
        (Warmup(0.2, Cosine(), restart=True), {0: 0, 0.1: 0.5, 0.2: 1, 0.6: 0.5, 1: 0}),
        (Warmup(0.2, Warmup(0.5, Constant(), restart=True), restart=True), {0.1: 0.5, 0.2: 0, 0.4: 0.5, 0.6: 1}),
        (warmup_stable_decay(0.1, 0.2), {0: 0, 0.05: 0.5, 0.1: 1, 0.8: 1, 0.9: 0.5, 1: 0}),
    ],
)
def test_factors(schedule, points):
    for progress, factor in points.items():
        assert schedule(progress) == pytest.approx(factor, abs=1e-12)
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    for step in range(101):
        assert 0 <= copy(step / 100) <= 1
    for progress in (-1e-9, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"progress is .*; a share from 0 to 1 was expected"):
            schedule(progress)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Polynomial(power=0), "power is 0"),
        (lambda: Polynomial(floor=2), "floor is 2"),
        (lambda: Exponential(0), "end is 0; .* not 0"),
        (lambda: Cosine(floor=-0.1), "floor is -0.1"),
        (lambda: StableDecay(0), "decay is 0; .*Constant"),
        (lambda: StableDecay(shape="cube"), "shape is 'cube'"),
        (lambda: Warmup(1, Constant()), "share is 1; "),
        (lambda: warmup_stable_decay(0.6, 0.5), r"warmup \+ decay is 0.6 \+ 0.5"),
        (lambda: Budget(), "steps is None and seconds is None"),
        (lambda: Budget(steps=1, seconds=1), "exactly one"),
        (lambda: Budget(steps=0), "steps is 0"),
        (lambda: Budget(seconds=math.inf), "seconds is inf"),
        (lambda: Budget(steps=3).load_state_dict({"step": 1}), "state of the budget is {'step': 1}"),
        (lambda: Budget(steps=3).load_state_dict({"step": -1, "elapsed": 0}), "both at least 0"),
        (lambda: BatchRamp(0, 8), "start is 0"),
        (lambda: BatchRamp(8, 20, multiple=8), r"end is 20; .* 8 \(multiple\) divides"),
        (lambda: BatchRamp(16, 8), r"start is 16; at most end \(8\)"),
        (lambda: BatchRamp(8, 16, share=1.5), "share is 1.5"),
        (lambda: BatchRamp(8, 16, multiple=0), "multiple is 0"),
        (lambda: BatchRamp(8, 16)(2), "progress is 2"),
        (lambda: LengthStages([]), "add up to 0"),
        (lambda: LengthStages([(0.9, 128), (0.2, 512)]), "add up to 1.1"),
        (lambda: LengthStages([(0, 128), (1, 512)]), "share of 0"),
        (lambda: LengthStages([(1, 0)]), "length of 0"),
        (lambda: LengthStages([(1, 128)])(-1), "progress is -1"),
    ],
)
def test_mistakes(build, says):
    with pytest.raises(ValueError, match=says):
        build()


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_steps():
    budget = Budget(steps=4)
    seen = []
    while not budget.done:
        seen.append(budget.progress)
        budget.advance()
    assert seen == [0, 0.25, 0.5, 0.75]
    assert budget.progress == 1
    budget.advance()
    assert budget.progress == 1
    longer = Budget(steps=10)
    longer.load_state_dict(budget.state_dict())
    assert longer.progress == 0.5


def test_seconds():
    clock = Clock()
    budget = Budget(seconds=10, clock=clock)
    clock.now += 2
    assert budget.progress == 0  # within a step it stands still
    budget.advance()
    assert budget.progress == 0.2
    clock.now += 50
    budget.restart_clock()  # those 50 s do not count
    clock.now += 1
    budget.advance()
    assert budget.progress == 0.3
    state = json.loads(json.dumps(budget.state_dict()))
    assert state == {"step": 2, "elapsed": 3}

    later = Clock()
    later.now = 5.0  # another process, another machine
    resumed = Budget(seconds=10, clock=later)
    later.now += 7
    resumed.load_state_dict(state)
    later.now += 1
    resumed.advance()
    assert resumed.elapsed == 4
    assert resumed.step == 3
    assert resumed.progress == 0.4
    later.now += 100
    resumed.advance(elapsed=5.5)  # another rank's word
    assert resumed.progress == 0.55
    later.now += 6
    resumed.advance()
    assert resumed.done
    assert resumed.progress == 1


def test_the_clock_of_the_machine():
    budget = Budget(seconds=1000)
    budget.advance()
    assert 0 <= budget.elapsed < 10


def test_batch_ramp():
    ramp = BatchRamp(256, 4096, share=0.6, multiple=256)
    sizes = [ramp(step / 1000) for step in range(1001)]
    assert sizes[0] == 256
    assert set(sizes[600:]) == {4096}
    assert set(sizes) == set(range(256, 4097, 256))
    assert all(before <= after for before, after in itertools.pairwise(sizes))
    assert [ramp(x) for x in (0.0399, 0.04, 0.2999, 0.3, 0.5999)] == [256, 512, 2048, 2048, 3840]
    assert ramp(0.32) == 2304
    assert BatchRamp(8, 8, share=0)(0) == 8
    assert BatchRamp(8, 16, share=0)(0) == 16
    assert pickle.loads(pickle.dumps(ramp)) == ramp


def test_length_stages():
    stages = LengthStages([(0.9, 128), (0.1, 512)])
    assert [stages(step / 125000) for step in (0, 112499, 112500, 125000)] == [128, 128, 512, 512]
    assert [stages.index(x) for x in (0, 0.9, 1)] == [0, 1, 1]
    tenths = LengthStages([(0.1, n + 1) for n in range(10)])
    assert [tenths(step / 10) for step in range(11)] == [*range(1, 11), 10]
    assert pickle.loads(pickle.dumps(stages)) == stages
    assert hash(stages) == hash(LengthStages(((0.9, 128), (0.1, 512))))
