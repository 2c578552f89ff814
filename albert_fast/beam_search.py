"""Beam search over a model that gives log-probabilities of the next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def beam_search(
    scores: Callable[[Tensor, int], Tensor],
    reorder: Callable[[Tensor], None],
    *,
    batch_size: int,
    num_beams: int,
    begin: int,
    end: int,
    length_penalty: float,
    max_lengths: Sequence[int],
    device: torch.device,
) -> list[list[int]]:
    """The best sequence of each batch row, without `begin` and `end`.

    A row is done when num_beams sequences have ended and the best open one, were it to end now, is not better than all
    of them; or at its most tokens, where open ones count as they are.

    Args:
        scores: scores(ids, place): log-probabilities [batch_size * num_beams, vocab] of what follows `ids`, each row's
            token number `place`. A batch row's beams are neighbors.
        reorder: reorder(rows): the model's row i becomes what rows[i] was.
        length_penalty: the summed log-probability is divided by ((5 + length) / 6) to this power.
        max_lengths: most tokens of each batch row, `end` included.
    """
    rows = batch_size * num_beams
    ids = torch.full([rows], begin, device=device)
    totals = torch.full([batch_size, num_beams], -torch.inf, device=device)
    totals[:, 0] = 0.0  # the beams are one at first
    tokens: list[list[int]] = [[] for _ in range(rows)]
    ended: list[list[tuple[float, list[int]]]] = [[] for _ in range(batch_size)]
    done = [limit < 1 for limit in max_lengths]

    def penalized(total: float, length: int) -> float:
        return total / ((5 + length) / 6) ** length_penalty

    place = 0
    while not all(done):
        following = scores(ids, place)
        vocab = following.shape[1]
        candidates = (totals[:, :, None] + following.view(batch_size, num_beams, vocab)).flatten(1)
        # Twice as many as there are beams: at most half of them end.
        best = candidates.topk(min(2 * num_beams, candidates.shape[1]), dim=1)
        values, places = best.values.tolist(), best.indices.tolist()
        place += 1
        sources, chosen, sums = list(range(rows)), [end] * rows, [[-torch.inf] * num_beams for _ in range(batch_size)]
        kept = [list(row) for row in tokens]
        for row in range(batch_size):
            if done[row]:
                continue
            open_beams = 0
            for rank, (value, index) in enumerate(zip(values[row], places[row], strict=True)):
                beam, token = divmod(index, vocab)
                if value == -torch.inf:
                    break
                if token == end:
                    if rank < num_beams:
                        ended[row].append((penalized(value, place), tokens[row * num_beams + beam]))
                    continue
                at = row * num_beams + open_beams
                sources[at], chosen[at] = row * num_beams + beam, token
                sums[row][open_beams] = value
                kept[at] = [*tokens[row * num_beams + beam], token]
                open_beams += 1
                if open_beams == num_beams:
                    break
            best_open = penalized(sums[row][0], place) if open_beams else -float("inf")
            full = len(ended[row]) >= num_beams and max(score for score, _ in ended[row]) >= best_open
            if full or not open_beams:
                done[row] = True
            elif place >= max_lengths[row]:
                beams = range(open_beams)
                ended[row] += [(penalized(sums[row][i], place), kept[row * num_beams + i]) for i in beams]
                done[row] = True
        tokens = kept
        totals = torch.tensor(sums, device=device)
        ids = torch.tensor(chosen, device=device)
        if not all(done):
            reorder(torch.tensor(sources, device=device))
    return [max(found)[1] if found else [] for found in ended]
