"""A peer in a process of its own, that calls when it is told to.

Peers in one process disturb each other: each brings threads that go on spinning for a while after a call, on cores
that the next one needs. In processes they are asked in turn, A B A B …, so that a machine whose speed drifts is as
unfair to one as to another, and each one's peak memory is its own.

The process is `python -m albert_fast.bench.worker REQUEST`; it answers each line of its input with one of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from albert_fast.bench import peers
from albert_fast.bench.data import Batch
from albert_fast.bench.parity import Results, results
from albert_fast.bench.peers import PEERS, call
from albert_fast.config import AlbertConfig
from albert_fast.memory import peak_resident_bytes

CPU = torch.device("cpu")


@contextlib.contextmanager
def with_threads(number: int | None) -> Iterator[int]:
    """PyTorch has so many threads inside; as many as before when None."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield number or before
    finally:
        torch.set_num_threads(before)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class WorkerError(RuntimeError):
    """A peer's process failed; with the last line that it wrote."""


class Contender(Protocol):
    """A peer that is ready for one piece of work."""

    def results(self) -> Results:
        """What the work gives, for the parity check; builds the peer first, which warms it up."""

    def call(self) -> object:
        """Does the work once."""

    def seconds(self) -> float:
        """The time of doing it once, in a turn of its own (`time_call`)."""

    def peak_bytes(self) -> int | None: ...

    def close(self) -> None: ...


class Process:
    """A process that has built a peer and waits for orders.

    It is `python -m MODULE DIRECTORY`; the directory has `request`, what it is to know, as `request.pt`.
    """

    def __init__(self, peer: str, module: str, request: Mapping[str, Any]) -> None:
        self.peer = peer
        self._directory = tempfile.TemporaryDirectory()
        known = {"peer": peer, "plug_ins": list(peers.PLUG_INS), "threads": torch.get_num_threads()}
        torch.save({**request, **known}, self._file("request.pt"))
        self._errors = open(self._file("errors"), "w+")  # noqa: SIM115
        command = [sys.executable, "-m", module, self._directory.name]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True)

    def _file(self, name: str) -> str:
        return str(Path(self._directory.name) / name)

    def _ask(self, order: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(order + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or [f"exit status {self._process.returncode}"])[-1]
            raise WorkerError(f"{self.peer} failed: {last}")
        return json.loads(answer)

    def call(self) -> None:
        """One call, which nobody times here."""
        self._ask("once")

    def seconds(self) -> float:
        """The time of one call (`time_call`)."""
        return self._ask("call")

    def peak_bytes(self) -> int | None:
        """The most memory that the process has held, or on a GPU has allocated there."""
        return self._ask("peak")

    def close(self) -> None:
        """Ends the process; what is closed stays so."""
        if self._errors.closed:
            return
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        self._directory.cleanup()


class Worker(Process):
    """The process of a peer that computes one batch, again and again."""

    def __init__(
        self, peer: str, config: AlbertConfig, state_dict: Mapping[str, Tensor], batch: Batch, mode: str, dtype: str
    ) -> None:
        request = {
            "config": config.to_dict(),
            "state_dict": dict(state_dict),
            "batch": asdict(batch),
            "mode": mode,
            "dtype": dtype,
        }
        super().__init__(peer, "albert_fast.bench.worker", request)

    def results(self) -> Results:
        """What the call computes; builds the peer first."""
        self._ask("results")
        return torch.load(self._file("results.pt"), weights_only=True, map_location="cpu")


def interleave(
    workers: Mapping[str, Contender], repeats: int, progress: Callable[[str], None] = lambda name: None
) -> dict[str, list[float]]:
    """Seconds of each worker's call, `repeats` of them by name. Their results were asked for before: that warmed up."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(repeats):
        for name, worker in workers.items():
            progress(name)
            seconds[name].append(worker.seconds())
    return seconds


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)


# ------------------------------------------------------------------------------------------------------- in the process


# Short calls are repeated for so long, in seconds.
TURN = 0.5


def time_call(function: Callable[[], object], device: torch.device, turn: float = TURN) -> float:
    """Seconds of one call. A short one is repeated, and the median without the first counts: since this process's last
    turn the others had the cores and their caches."""

    def once() -> float:
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        return time.perf_counter() - start

    first, end = once(), time.perf_counter() + turn
    if first > turn:
        return first
    repeated = [once()]
    while time.perf_counter() < end:
        repeated.append(once())
    return median(repeated)


def read_request(directory: str) -> tuple[dict[str, Any], Callable[[object], None]]:
    """What the process is to know, and how it answers an order."""
    # Answers go where nobody else writes: exporters and compilers print.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = torch.load(Path(directory) / "request.pt", weights_only=True)
    torch.set_num_threads(request["threads"])
    for plug_in in request["plug_ins"]:
        peers.add(plug_in)

    def answer(value: object) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    return request, answer


def peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()


def main(directory: str) -> None:
    request, answer = read_request(directory)
    batch, mode = Batch(**request["batch"]), request["mode"]
    device = batch.input_ids.device
    peer = PEERS[request["peer"]]()
    peer.build(AlbertConfig.from_dict(request["config"]), request.pop("state_dict"), request["dtype"], device, batch)
    for order in map(str.strip, sys.stdin):
        if order == "results":
            torch.save(results(peer, batch, mode), Path(directory) / "results.pt")
            answer(None)
        elif order == "once":
            call(peer, batch, mode)
            synchronize(device)
            answer(None)
        else:
            answer(time_call(lambda: call(peer, batch, mode), device) if order == "call" else peak_bytes(device))


if __name__ == "__main__":
    main(sys.argv[1])
