"""The search for a micro-batch: on machines that are made up, and on this one with a model that takes no time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from albert_fast import AlbertConfig, AlbertForMaskedLM, PackedBatch
from albert_fast import memory as host
from albert_fast.pretraining.batch_size import Found, find_batch_size, memory_of

GB = 10**9
LENGTH = 128


class Machine:
    """Rows at `rate` tokens a second, each `row` bytes beside `fixed` ones; its clock and its memory."""

    def __init__(self, rate, *, row=GB, fixed=2 * GB, limit=100 * GB, fails_at=None, error=torch.OutOfMemoryError):
        self.rate, self.row, self.fixed, self.bytes, self.fails_at = rate, row, fixed, limit, fails_at
        self.error = error
        self.now = 0.0
        self.calls: list[int] = []
        self.top = fixed

    def run(self, rows: int) -> int:
        self.calls.append(rows)
        if self.fails_at is not None and rows >= self.fails_at:
            raise self.error("out of memory; can't allocate memory")
        assert self.fixed + rows * self.row <= self.bytes, "the system kills the process"
        self.top = max(self.top, self.fixed + rows * self.row)
        first = self.calls[-2:-1] != [rows]
        self.now += rows * LENGTH / self.rate(rows) * (10 if first else 1)
        return rows * LENGTH

    def reset(self) -> None:
        self.top = self.fixed

    def used(self) -> int:
        return self.fixed

    def peak(self) -> int:
        return self.top

    def limit(self) -> int:
        return self.bytes

    def find(self, **options) -> Found:
        return find_batch_size(self.run, memory=self, clock=lambda: self.now, **options)


def saturating(rows: int) -> float:
    """Half of the best rate at 4 rows."""
    return 10_000 * rows / (rows + 4)


def tried(found: Found) -> list[int]:
    return [size.rows for size in found.table if size.tokens_per_second is not None]


def test_until_memory_ends():
    machine = Machine(saturating)
    found = machine.find()
    # 64 rows take 66 GB, of which 128 would be 130.
    assert tried(found) == [1, 2, 4, 8, 16, 32, 64]
    assert max(machine.calls) == 64
    assert found.rows == 64
    assert found.tokens_per_second == pytest.approx(saturating(64))
    assert found.table[-1].peak == 130 * GB
    assert found.table[-1].verdict.startswith("not tried")


def test_until_more_is_no_faster():
    found = Machine(lambda rows: 5000.0 + min(rows, 8), limit=10**15).find()
    assert tried(found) == [1, 2, 4]
    assert found.rows == 1
    found = Machine(lambda rows: 1000.0 * min(rows, 8), limit=10**15).find()
    assert tried(found) == [1, 2, 4, 8, 16, 32]
    assert found.rows == 8


@pytest.mark.parametrize("bad", [2, 4, 8])
def test_one_bad_size_does_not_stop_it(bad):
    found = Machine(lambda rows: 900.0 if rows == bad else 1000.0 * min(rows, 16), limit=10**15).find()
    assert found.rows == 16


def test_one_slow_call_does_not_count():
    machine = Machine(lambda rows: 128.0)
    plain = machine.run

    def run(rows: int) -> int:
        machine.now += 5.0 if len(machine.calls) == 2 else 0.0
        return plain(rows)

    machine.run = run
    assert machine.find(most=1).tokens_per_second == pytest.approx(128.0)


def test_the_smallest_that_is_as_good():
    rates = {1: 1000.0, 2: 2000.0, 4: 2911.0, 8: 3000.0, 16: 2990.0}
    assert Machine(lambda rows: rates[rows]).find(most=16).rows == 4
    rates[4] = 2909.0
    assert Machine(lambda rows: rates[rows]).find(most=16).rows == 8


def test_what_leaves_too_little_is_not_chosen():
    """A size whose need was not foretold: it took more than twice what the one before did."""
    machine = Machine(saturating, fixed=0, row=10 * GB)
    plain = machine.peak
    machine.peak = lambda: plain() + (12 * GB if machine.calls[-1] == 8 else 0)
    found = machine.find()
    assert tried(found) == [1, 2, 4, 8]
    assert found.rows == 4
    assert [size.verdict for size in found.table[2:4]] == ["chosen", "takes too much memory"]


def test_one_row_that_takes_nearly_all_is_the_least_there_is():
    found = Machine(saturating, row=95 * GB).find()
    assert found.rows == 1
    assert found.table[0].verdict == "chosen, takes too much memory"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError, MemoryError, RuntimeError], ids=["cuda", "python", "cpu allocator"]
)
def test_out_of_memory(error):
    machine = Machine(saturating, limit=10**15, fails_at=16, error=error)
    found = machine.find()
    assert found.rows == 8
    assert found.table[-1].rows == 16
    assert found.table[-1].verdict == "out of memory"
    assert machine.calls.count(16) == 1
    with pytest.raises(ValueError, match="not even one row fits"):
        Machine(saturating, fails_at=1, error=error).find()


def test_other_errors_are_not_hidden():
    with pytest.raises(IndexError):
        Machine(saturating, fails_at=4, error=IndexError).find()
    machine = Machine(saturating)
    machine.run = lambda rows: torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(RuntimeError, match="size"):
        machine.find()


def test_most_and_repeats():
    machine = Machine(lambda rows: 128.0)
    assert tried(machine.find(most=3, repeats=5)) == [1, 2]
    assert machine.calls == [1] * 6 + [2] * 6
    machine = Machine(lambda rows: 1280.0)  # a tenth of a second: repeated for half a second
    machine.find(most=1)
    assert len(machine.calls) == 6
    for options, says in [({"most": 0}, "most is 0"), ({"repeats": 0}, "repeats is 0")]:
        with pytest.raises(ValueError, match=says):
            machine.find(**options)


def test_the_table():
    text = str(Machine(saturating, row=GB // 2, fails_at=8).find())
    assert text == "\n".join(
        [
            "  rows    tokens/s        peak  of memory",
            "     1       2,000     2.50 GB         2%",
            "     2       3,333     3.00 GB         3%",
            "     4       5,000     4.00 GB         4%  chosen",
            "     8           -           -          -  out of memory",
            "micro-batch: 4 rows, 5,000 tokens/s; memory: 100.00 GB",
        ]
    )
    wide = str(Machine(lambda rows: 1e6 * rows, row=7 * GB, limit=999 * GB).find())
    assert max(map(len, [*text.splitlines(), *wide.splitlines()])) <= 80


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_model(kind):
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if kind == "cpu" and host.available_bytes() is None:
        pytest.skip("this system does not tell how much memory is free")
    device = torch.device(kind)
    config = AlbertConfig(
        vocab_size=500, hidden_size=64, num_attention_heads=2, intermediate_size=128, num_hidden_layers=2
    )
    model = AlbertForMaskedLM(config).to(device).train()

    def run(rows: int) -> int:
        ids = torch.randint(5, 500, (rows, 32), device=device)
        model(PackedBatch.from_padded(ids), labels=ids.flatten()).loss.backward()
        if kind == "cuda":
            torch.cuda.synchronize()
        return ids.numel()

    run(1)
    found = find_batch_size(run, memory=memory_of(device), most=4, repeats=1)
    print(found)
    assert found.rows in (1, 2, 4)
    assert found.tokens_per_second > 0
    peaks = [size.peak for size in found.table]
    assert all(peak is not None and 0 < peak < found.limit for peak in peaks)


# ---------------------------------------------------------------------------------------------------- the host's memory


def test_memory_of_this_process():
    if host.resident_bytes() is None:
        pytest.skip("this system does not tell what a process holds")
    host.reset_peak()
    before = host.resident_bytes()
    block = torch.ones(100_000_000, dtype=torch.uint8)
    assert host.resident_bytes() - before > 80_000_000
    del block
    assert host.peak_resident_bytes() - before > 80_000_000
    host.reset_peak()
    assert host.peak_resident_bytes() - before < 50_000_000
    assert host.available_bytes() > 0


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A file system for /proc and /sys/fs/cgroup, with 1000 kB available."""
    monkeypatch.setattr(host, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(host, "_CGROUPS", tmp_path / "cgroup")

    def write(files: dict[str, str]) -> None:
        for name, content in files.items():
            path: Path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    write({"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    1000 kB\n"})
    return write


VERSION_2 = {
    "proc/self/cgroup": "0::/user/job\n",
    "cgroup/memory.stat": "anon 5\n",
    "cgroup/user/memory.max": "900000\n",
    "cgroup/user/memory.current": "500000\n",
    "cgroup/user/memory.stat": "anon 5\ninactive_file 100000\n",
    "cgroup/user/job/memory.max": "max\n",
    "cgroup/user/job/memory.current": "400000\n",
    "cgroup/user/job/memory.stat": "inactive_file 100000\n",
}
VERSION_1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/docker/1f\n0::/\n",
    "cgroup/memory/memory.limit_in_bytes": "700000\n",
    "cgroup/memory/memory.usage_in_bytes": "600000\n",
    "cgroup/memory/memory.stat": "total_inactive_file 50000\ninactive_file 7\n",
}


@pytest.mark.parametrize(
    ("files", "available"),
    [
        pytest.param({}, 1_024_000, id="no cgroups"),
        pytest.param(VERSION_2, 500_000, id="version 2, of the group around it"),
        pytest.param({**VERSION_2, "cgroup/user/job/memory.max": "350000"}, 50_000, id="version 2, its own"),
        pytest.param({**VERSION_2, "cgroup/user/memory.max": "10"}, 0, id="version 2, used up"),
        pytest.param({**VERSION_2, "cgroup/user/memory.max": "9000000"}, 1_024_000, id="version 2, more than there is"),
        pytest.param(VERSION_1, 150_000, id="version 1, in a container"),
    ],
)
def test_available_memory(system, files, available):
    system(files)
    assert host.available_bytes() == available


def test_a_system_that_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "_PROC", tmp_path)
    assert host.resident_bytes() is None
    assert host.available_bytes() is None
    with pytest.raises(ValueError, match="does not tell how much memory is free"):
        memory_of(torch.device("cpu"))
