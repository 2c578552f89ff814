"""Calls that a loop makes again and again: what is found for the first is kept for the others.

To start a kernel costs the host some microseconds. To find out what to start, from the arguments of a function down to
the integers of a kernel, costs three times as much, and is the same in every pass over a layer that is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from albert_fast import devices
from albert_fast.kernels.launch import Start, Started, alignment, noting, start, taking


class Repeated:
    """`function(*tensors, site=site)`, which does nothing but to start kernels, called more than once.

    All calls are of one kind: tensors at the same places have one shape, strides, dtype and device, or are None; what
    the function takes from elsewhere does not change. The first call of each pattern of None, and of addresses that are
    aligned, runs the function. On a GPU the next ones start its kernels with their own addresses and site. They do not
    where the function gave a kernel a tensor that is not among `tensors`, or one tensor stands at two places.
    """

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function
        self._present: dict[tuple[type, ...], Callable[[tuple[Any, ...]], tuple[Any, ...]]] = {}
        self._known: dict[tuple[Any, ...], list[_Again]] = {}

    def __call__(self, *tensors: Tensor | None, site: int = 0) -> None:
        types = tuple(map(type, tensors))
        present = self._present.get(types)
        if present is None:
            present = taking([place for place, tensor in enumerate(tensors) if tensor is not None])
            self._present[types] = present
        given = present(tensors)
        kind = types, alignment(given)
        known = self._known.get(kind)
        if known is None:
            with noting() as starts:
                self._function(*tensors, site=site)
            known = _find(starts, tensors)
            if known is not None:
                self._known[kind] = known
            return
        device = given[0].device
        with devices.current(device):
            stream = devices.stream_of(device)
            for each in known:
                start(each.started, each.grid, each.arguments((*each.others, site, *tensors)), stream)


class _Again(NamedTuple):
    """One kernel of a call.

    Attributes:
        others: its arguments that are neither tensors nor the site, and None in their places.
        arguments: takes all of them, in order, out of `others`, the site and the tensors.
    """

    started: Started
    grid: tuple[int, int, int]
    others: list[Any]
    arguments: Callable[[tuple[Any, ...]], tuple[Any, ...]]


def _find(starts: Sequence[Start | None], tensors: Sequence[Tensor | None]) -> list[_Again] | None:
    """What a later call starts; None where it has to run the function, too."""
    given = {id(tensor): place for place, tensor in enumerate(tensors) if tensor is not None}
    if len(given) < len(tensors) - sum(tensor is None for tensor in tensors):
        return None
    found = []
    for each in starts:
        again = None if each is None else _again(each, given)
        if again is None:
            return None
        found.append(again)
    return found


def _again(first: Start, given: dict[int, int]) -> _Again | None:
    """given: the place of each tensor, by its id."""
    others, kernel = [*first.arguments], first.kernel
    places, end = [*range(len(others))], len(others)
    for number, argument in enumerate(first.arguments):
        place = given.get(id(argument))
        if place is not None:
            others[number], places[number] = None, end + 1 + place
        elif isinstance(argument, Tensor):
            return None
    if "site" in kernel.arg_names:
        site = kernel.arg_names.index("site")
        if not kernel.params[site].do_not_specialize:
            return None
        places[site] = end
    return _Again(first.started, first.grid, others, taking(places))
