"""Peak resident memory of one call, in a process of its own: `python -m albert_fast.bench.memory REQUEST`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from albert_fast import AlbertConfig, AlbertForMaskedLM
from albert_fast.bench.data import Batch
from albert_fast.bench.peers import PEERS, call


def peak_resident_bytes() -> int | None:
    """The most memory that this process has held; None where the system does not tell.

    On Linux that is VmHWM: getrusage's figure survives exec, so that a child would begin with its parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        return None if line is None else int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_of_call(peer: str, config: AlbertConfig, batch: Batch, mode: str, dtype: str) -> int | None:
    """Peak resident bytes of a process that builds `peer` with random weights and makes the call once, on the CPU.

    Raises:
        RuntimeError: the process failed; with the last line that it wrote.
    """
    request = {
        "peer": peer,
        "config": config.to_dict(),
        "batch": asdict(batch),
        "mode": mode,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "request.pt"
        torch.save(request, file)
        command = [sys.executable, "-m", "albert_fast.bench.memory", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(f"measuring the memory of {peer} failed: {last}")
    printed = done.stdout.split()[-1]
    return None if printed == "None" else int(printed)


def main(file: str) -> None:
    request = torch.load(file, weights_only=True)
    torch.set_num_threads(request["threads"])
    config = AlbertConfig.from_dict(request["config"])
    peer = PEERS[request["peer"]]()
    batch = Batch(**request["batch"])
    peer.build(config, AlbertForMaskedLM(config).state_dict(), request["dtype"], torch.device("cpu"), batch)
    call(peer, batch, request["mode"])
    print(peak_resident_bytes())


if __name__ == "__main__":
    main(sys.argv[1])
