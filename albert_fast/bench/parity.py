"""Whether a peer computes the right thing, before anyone reads how fast it is.

The oracle is this package's reference in float64, on the very batch that is timed, a few rows at a time so that memory
does not grow with the batch. The yardstick is the reference in the same dtype, or under autocast too: this package may
be off by twice as much as plain PyTorch is. What is compared:

    inference  the last hidden states of the real tokens
    training   the loss, and each parameter's gradient

each by the Frobenius norm of the difference over that of the oracle. A gradient that is next to nothing (the key's
bias has none: softmax does not see it) is held against a thousandth of the largest one's root mean square instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from albert_fast.bench.data import Batch
from albert_fast.bench.peers import Peer, Reference
from albert_fast.config import AlbertConfig

# This package's error over the yardstick's, at most.
TOLERANCE = 2.0

# Beyond this an error is wrong whatever the yardstick; other packages, who have no yardstick, may go as far. int8 has
# nothing else, and those who calibrate may lose more.
LARGEST = {
    ("inference", "float32"): 1e-4,
    ("inference", "bfloat16"): 0.1,
    ("inference", "float16"): 0.02,
    ("inference", "int8"): 0.1,
    ("inference", "autocast"): 0.1,
    ("training", "float32"): 1e-3,
    ("training", "bfloat16"): 0.5,
    ("training", "float16"): 0.1,
    ("training", "autocast"): 0.5,
}
# What is claimed of this package's int8.
_INT8 = 0.03

# What is no gradient.
OUTPUTS = ("loss", "hidden states", "output")

# Tokens of the oracle's chunks.
_CHUNK_TOKENS = 1024

Results = dict[str, Tensor]


def oracle(config: AlbertConfig, state_dict: Mapping[str, Tensor], batch: Batch, mode: str) -> Results:
    """What `results` should be, in float64."""
    peer = Reference()
    peer.build(config, state_dict, "float64", batch.input_ids.device, batch)
    rows = max(1, _CHUNK_TOKENS // batch.input_ids.shape[1])
    chunks = [batch.rows(start, start + rows) for start in range(0, len(batch.lengths), rows)]
    if mode == "inference":
        return {"hidden states": torch.cat([_real_tokens(peer.inference(chunk), chunk) for chunk in chunks])}
    totals: Results = {}
    for chunk in chunks:
        if chunk.labelled == 0:
            continue
        share = chunk.labelled / batch.labelled
        loss, gradients = peer.loss_and_gradients(chunk, scale=share)
        for name, value in {"loss": loss * share, **gradients}.items():
            totals[name] = totals[name] + value if name in totals else value.clone()
    return totals


def results(peer: Peer, batch: Batch, mode: str) -> Results:
    """What the timed call of `peer` computes."""
    if mode == "inference":
        return {"hidden states": _real_tokens(peer.inference(batch), batch)}
    loss, gradients = peer.loss_and_gradients(batch)
    return {"loss": loss, **gradients}


def error(actual: Results, expected: Results) -> float:
    """The largest relative error of them all; infinite where one is missing or not finite."""
    rms = {name: value.double().square().mean().sqrt().item() for name, value in expected.items()}
    gradients = [value for name, value in rms.items() if name not in OUTPUTS]
    floor = 1e-3 * max(gradients, default=0.0)
    worst = 0.0
    for name, value in expected.items():
        if name not in actual or not bool(actual[name].isfinite().all()):
            return math.inf
        difference = (actual[name].double() - value.double()).square().mean().sqrt().item()
        scale = rms[name] if name in OUTPUTS else max(rms[name], floor)
        worst = max(worst, difference / scale if scale > 0.0 else (0.0 if difference == 0.0 else math.inf))
    return worst


def limits(
    config: AlbertConfig, state_dict: Mapping[str, Tensor], batch: Batch, mode: str, dtype: str, expected: Results
) -> tuple[float, float]:
    """The largest error that passes, of this package and of the others."""
    largest = LARGEST[mode, dtype]
    if dtype == "int8":
        return _INT8, largest
    yardstick = Reference()
    yardstick.build(config, state_dict, dtype, batch.input_ids.device, batch)
    yardstick.model.set_recompute(
        "layer"
    )  # the whole batch at once: of a large model its passes are more than a GPU holds
    return min(TOLERANCE * error(results(yardstick, batch, mode), expected), largest), largest


def _real_tokens(hidden: Tensor, batch: Batch) -> Tensor:
    """[batch, seq, hidden] -> [tokens, hidden]."""
    return hidden[batch.attention_mask != 0]
