"""What a run finds wrong with itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What is wrong with a step.

    Attributes:
        kind: a word for the log, such as not_finite.
        message: a paragraph for people: what was seen, what it means, what to try.
        fatal: weights and moments are to be taken back. Else it is only said.
    """

    kind: str
    message: str
    fatal: bool = True


def not_finite(loss: float, gradient_norm: float) -> Finding:
    return Finding(
        "not_finite",
        f"The loss is {loss:g} and the gradient's norm {gradient_norm:g}: an update from these would leave no weight a "
        "number. It is the end of a run that diverged (a lower learning rate, a longer warm-up or a larger batch "
        "helps), an overflow (float16 needs a loss scale, bfloat16 does not), or a weight that was no number before: "
        "go on from a checkpoint before it.",
    )
