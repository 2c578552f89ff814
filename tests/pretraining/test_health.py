"""Curves with and without an illness, drawn at random: what is found, and what is not."""

import json
import math
import random
import re

import pytest

from albert_fast.pretraining.health import Watch

UNIGRAM = 6.4


def learning(progress):
    """Nats below the unigram model: from a random model's -4 to 0 at once, then slowly on."""
    return -4 * math.exp(-progress / 0.01) + 3 * (1 - math.exp(-progress / 0.3))


def flat(level):
    return lambda progress: level - 4 * math.exp(-progress / 0.01)


def steps(shape, count, labels, seed=0, after=0, change=lambda steps: 0.0):
    """What `look` is shown: losses that are means over so many labels, and a change from step `after` on."""
    rng = random.Random(seed)
    for step in range(count):
        # The loss of a token is about exponential: most are easy, few are very hard.
        noise = rng.gammavariate(labels, 3 / labels) - 3
        unigram = UNIGRAM + rng.gauss(0, 0.8 / math.sqrt(labels))
        gain = shape(step / count) + (change(step - after) if step >= after else 0.0) + noise
        yield {
            "step": step,
            "progress": step / count,
            "masked_lm_loss": unigram - gain,
            "unigram_loss": unigram,
            "gradient_norm": 1.0,
        }


def findings(watch, shown):
    found = [(step["step"], watch.look(**step)) for step in shown]
    return [(step, finding.kind) for step, finding in found if finding is not None]


@pytest.mark.parametrize("labels", [1, 3, 10, 50, 600])
@pytest.mark.parametrize("count", [100, 3000])
def test_noise_is_no_illness(labels, count):
    for seed in range(5):
        assert findings(Watch(), steps(learning, count, labels, seed)) == []


@pytest.mark.parametrize(("labels", "fall"), [(600, 0.7), (600, 3.0), (50, 1.5), (10, 3.0)])
def test_collapse(labels, fall):
    """It is found once, soon after it happened, and the steps between are known to be suspicious."""
    for seed in range(5):
        watch, suspicious = Watch(), []
        found = []
        for step in steps(learning, 3000, labels, seed, after=2000, change=lambda steps: -fall):
            suspicious.append(watch.suspicious)
            found.append(watch.look(**step))
        kinds = [
            (number, finding.kind) for number, finding in enumerate(found) if finding and finding.kind != "plateau"
        ]
        assert [kind for _, kind in kinds] == ["collapse"]
        assert 2100 < kinds[0][0] < 2500
        assert not any(suspicious[:2000])
        assert all(suspicious[kinds[0][0] - 50 : kinds[0][0]])


def test_a_collapse_is_told_in_numbers():
    watch = Watch()
    found = [watch.look(**step) for step in steps(learning, 3000, 600, after=2000, change=lambda steps: -3.0)]
    (message,) = [finding.message for finding in found if finding is not None and finding.kind == "collapse"]
    assert re.search(r"it was 2\.\d\d nats below the unigram model's at step \d+, and now", message)
    assert re.search(r"now it is 0\.\d\d nats (below|above) the unigram model's, a loss of 6\.\d\d\.", message)
    assert "with a lower rate" in message


@pytest.mark.parametrize(
    ("size", "steps_back"), [(1.0, 50), (1.0, 200), (2.0, 200), (0.4, math.inf)], ids=lambda value: str(value)
)
def test_what_comes_back_is_no_collapse(size, steps_back):
    """As after a change of the sequence length: the new positions are learned, or the level is another one."""
    for seed in range(5):
        shown = steps(learning, 6000, 600, seed, after=4000, change=lambda steps: -size * math.exp(-steps / steps_back))
        assert findings(Watch(), shown) == []


def test_a_slow_fall_is_a_collapse():
    shown = steps(learning, 6000, 600, after=3000, change=lambda steps: -min(1.5, steps / 1000))
    kinds = [kind for _, kind in findings(Watch(), shown)]
    assert kinds[0] == "collapse"


def test_rarer_words_are_no_collapse():
    """A text whose loss is two nats higher, and the unigram model's as well."""
    watch = Watch()
    for step in steps(learning, 3000, 600):
        harder = 2.0 * (step["step"] >= 2000)
        step |= {name: step[name] + harder for name in ("masked_lm_loss", "unigram_loss")}
        assert watch.look(**step) is None


@pytest.mark.parametrize("count", [300, 3000])
@pytest.mark.parametrize("labels", [10, 600])
@pytest.mark.parametrize(("level", "word"), [(0.02, "frequency of the words alone"), (-1.0, "not even")])
def test_plateau(count, labels, level, word):
    """Once, after a tenth of the run at the earliest."""
    for seed in range(5):
        watch = Watch()
        found = [(step["progress"], watch.look(**step)) for step in steps(flat(level), count, labels, seed)]
        ((progress, finding),) = [(progress, finding) for progress, finding in found if finding is not None]
        assert finding.kind == "plateau"
        # Short runs have few steps to tell noise from learning.
        assert 0.1 <= progress <= (0.2 if labels == 600 and count == 3000 else 1.0)
        assert word in finding.message
        assert f"{abs(level):.1f}" in finding.message or labels == 10


def test_what_is_still_learned_is_no_plateau():
    """Slowly, and not far yet."""
    assert findings(Watch(), steps(lambda progress: 1.2 * progress - 0.06, 3000, 600)) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["masked_lm_loss", "unigram_loss", "gradient_norm"])
def test_not_finite(name, value):
    """Named, each time, and without a trace."""
    watch, other = Watch(), Watch()
    for step in steps(learning, 200, 50):
        assert watch.look(**step) is other.look(**step) is None
        finding = watch.look(**{**step, name: value})
        assert finding.kind == "not_finite"
        assert watch.state_dict() == other.state_dict()
    assert name == "unigram_loss" or str(value) in finding.message


@pytest.mark.parametrize("cut", [0, 1, 60, 2050, 2300])
def test_a_watch_goes_on(cut):
    shown = list(steps(learning, 2600, 600, after=2000, change=lambda steps: -2.0))
    whole, first, second = Watch(), Watch(), Watch()
    assert findings(first, shown[:cut]) == findings(whole, shown[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert findings(second, shown[cut:]) == findings(whole, shown[cut:])
    assert second.state_dict() == whole.state_dict()


def test_wrong_arguments():
    for name, value in [
        ("collapse", 0.0),
        ("collapse", math.nan),
        ("smoothing", 1.0),
        ("plateau_after", 0.0),
        ("plateau_nats", -1.0),
    ]:
        with pytest.raises(ValueError, match=f"{name} is"):
            Watch(**{name: value})
    with pytest.raises(ValueError, match="has step; looks"):
        Watch().load_state_dict({"step": 1})
