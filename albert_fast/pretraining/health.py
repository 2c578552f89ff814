"""Seeing that a run is ill: a loss that is no number, one that has collapsed, one that stays at the unigram model's.

The measure is the gain, how many nats a batch's masked-LM loss is below the loss of a model that knows the frequencies
of the words and nothing else: batches with rarer words, or other masks, do not make it fall.

A collapse has to be more than noise: the smoothed gain falls below its best by more than `collapse` and by more than
ten times its own standard error, and over two spans of the smoothing's length it neither comes back nor begins to.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from albert_fast.ops.checks import check
from albert_fast.training.findings import Finding, not_finite

# Standard errors of the smoothed gain. The best of a long run is a few above the truth, and the worst as many below.
NOISE = 10.0
# Of plateau_nats, from one window to the next: what counts as learning.
STILL_LEARNING = 0.25
# Of what was lost, from one span to the next: what comes back at this pace, after a change of the length, say, is no
# collapse.
RECOVERING = 0.05


@dataclass
class _State:
    looks: int = 0
    gain: float = 0.0  # exponential means, before the correction of their start at 0: of the gain,
    square: float = 0.0  # and of the square of its distance from the mean so far
    best: float | None = None  # highest smoothed gain, once that has seen enough
    best_step: int = 0
    below: int = 0  # looks since it fell below the best by too much
    span_sum: float = 0.0  # of the gain, over the span of them that is not full yet
    span_before: float | None = None  # mean of the span before
    # Means of the gain over windows of half of plateau_after.
    window: float = 0.0  # progress where this one began
    window_sum: float = 0.0
    window_looks: int = 0
    window_before: float | None = None
    plateau_found: bool = False


class Watch:
    """Looks at each step of a run; a pure function of what it was shown.

    Args:
        collapse: nats that the smoothed gain may lose.
        smoothing: of the exponential mean, per step; 0.98 remembers about 50.
        plateau_after: the share of the run after which a plateau is one.
        plateau_nats: a gain below this, and not growing by a quarter of it in half of `plateau_after`, is a plateau.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        *,
        collapse: float = 0.5,
        smoothing: float = 0.98,
        plateau_after: float = 0.1,
        plateau_nats: float = 0.1,
    ) -> None:
        for name, value in (("collapse", collapse), ("plateau_nats", plateau_nats)):
            check(0 < value < math.inf, f"{name} is {value}; nats above 0 were expected")
        check(0 <= smoothing < 1, f"smoothing is {smoothing}; a number in [0, 1) was expected, such as 0.98")
        check(0 < plateau_after <= 1, f"plateau_after is {plateau_after}; a share of the run in (0, 1] was expected")
        self.collapse, self.smoothing = collapse, smoothing
        self.plateau_after, self.plateau_nats = plateau_after, plateau_nats
        self.memory = math.ceil(1 / (1 - smoothing) - 1e-9)  # looks; 1e-9: 1 - 0.98 is rounded
        self._state = _State()

    @property
    def suspicious(self) -> bool:
        """Whether the loss may be collapsing right now: the weights of a step before are the better ones to keep."""
        return self._state.below > 0

    def look(
        self, *, step: int, progress: float, masked_lm_loss: float, unigram_loss: float, gradient_norm: float
    ) -> Finding | None:
        """One step's figures, before its update; what is wrong, if anything.

        A step that is not finite leaves no trace. After a collapse, the loss is held against what it was then: each one
        is found once. A plateau is found once in a run.

        Args:
            step, progress: of the run, the latter from 0 to 1.
            masked_lm_loss, unigram_loss: means over the batch's labels, in nats.
            gradient_norm: before clipping.
        """
        if not all(map(math.isfinite, (masked_lm_loss, unigram_loss, gradient_norm))):
            return not_finite(masked_lm_loss, gradient_norm)
        gain = unigram_loss - masked_lm_loss
        smoothed = self._smooth(gain)
        return self._collapse(step, gain, smoothed, unigram_loss) or self._plateau(progress, gain)

    def _smooth(self, gain: float) -> float:
        state, keep = self._state, self.smoothing
        if state.looks:
            distance = gain - state.gain / (1 - keep**state.looks)
            state.square = keep * state.square + (1 - keep) * distance**2
        state.gain = keep * state.gain + (1 - keep) * gain
        state.looks += 1
        return state.gain / (1 - keep**state.looks)

    def _collapse(self, step: int, gain: float, smoothed: float, unigram_loss: float) -> Finding | None:
        state = self._state
        if state.looks < self.memory:
            return None
        if state.best is None or smoothed > state.best:
            state.best, state.best_step = smoothed, step
        # Of independent numbers, an exponential mean has this much of the variance.
        share = (1 - self.smoothing) / (1 + self.smoothing)
        error = math.sqrt(share * state.square / (1 - self.smoothing ** max(1, state.looks - 1)))
        fall = state.best - smoothed
        if fall <= max(self.collapse, NOISE * error):
            state.below, state.span_sum, state.span_before = 0, 0.0, None
            return None
        state.below += 1
        state.span_sum += gain
        if state.below % self.memory:
            return None
        mean, before = state.span_sum / self.memory, state.span_before
        state.span_sum, state.span_before = 0.0, mean
        if before is None or mean - before >= RECOVERING * (state.best - before):
            return None
        message = (
            f"The masked-LM loss has collapsed: smoothed over {self.memory} steps it was {_level(state.best)} at step "
            f"{state.best_step}, and now it is {_level(smoothed)}, a loss of {unigram_loss - smoothed:.2f}. It has "
            f"been so for {state.below} steps and does not come back. The usual cause is a learning rate that is too "
            "high for the batch: go on from a checkpoint before the fall, with a lower rate, a longer warm-up or a "
            "larger batch, and clip the gradient's norm (at 1.0, as ALBERT does)."
        )
        state.best, state.best_step = smoothed, step
        state.below, state.span_before = 0, None
        return Finding("collapse", message)

    def _plateau(self, progress: float, gain: float) -> Finding | None:
        state = self._state
        state.window_sum += gain
        state.window_looks += 1
        # 1e-9: shares of a run are rounded.
        if state.window_looks < self.memory or progress < state.window + self.plateau_after / 2 - 1e-9:
            return None
        mean, before = state.window_sum / state.window_looks, state.window_before
        state.window, state.window_sum, state.window_looks, state.window_before = progress, 0.0, 0, mean
        if state.plateau_found or before is None or progress < self.plateau_after - 1e-9:
            return None
        if mean >= self.plateau_nats or mean - before >= STILL_LEARNING * self.plateau_nats:
            return None
        state.plateau_found = True
        return Finding("plateau", _plateau_message(progress, mean, before, self.plateau_nats), fatal=False)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the saved watch was.

        Raises:
            ValueError: not what `state_dict` gives.
        """
        expected = [field.name for field in fields(_State)]
        check(
            sorted(state) == sorted(expected),
            f"the state of the watch has {', '.join(sorted(state)) or 'nothing'}; {', '.join(expected)} were expected",
        )
        self._state = _State(**state)


def _level(gain: float, of: str = "the unigram model's") -> str:
    """0.12 nats below the unigram model's."""
    return f"{abs(gain):.2f} nats {'below' if gain >= 0 else 'above'} {of}"


def _plateau_message(progress: float, mean: float, before: float, nats: float) -> str:
    seen = (
        f"After {progress:.0%} of the run the masked-LM loss is {_level(mean)}, and was {_level(before, 'it')} before:"
    )
    if mean < -5 * nats:
        return (
            f"{seen} not even the frequencies of the words are learned, which takes little. Look whether the learning "
            "rate is far too low, or so high that the run diverged at its start, whether all weights are trained, and "
            "whether the vocabulary is the one that made the corpus."
        )
    return (
        f"{seen} the model predicts by the frequency of the words alone and does not look at the context. ALBERT "
        "trained from scratch is often seen to stay there, at a loss of 6.6 to 7.3 (huggingface/transformers issues "
        "5984, 4727 and 10840, google-research/albert issue 29): random heads find the neighbors of a word late or not "
        "at all. Begin with heads that look at them (model.initialization: neighbors). Else try, one at a time: more "
        "steps, as some runs leave it late; another learning rate, with a warm-up (a higher one if the loss fell "
        "smoothly and stopped here, a lower one if it jumped up first); LAMB or AdamW with a larger batch; no dropout, "
        "which small models do not need; and look at the data: that the vocabulary is the one that made the corpus, "
        "and that the sentence-order labels are learned or switched off."
    )
