"""Which device is made the current one, and which stream is asked for. There is no GPU to these tests."""

from contextlib import nullcontext

import torch

from albert_fast import devices

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


def test_only_another_gpu_is_made_current(monkeypatch):
    made: list[torch.device] = []

    def device(device: torch.device) -> nullcontext[None]:
        made.append(device)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", device)
    for each in (CPU, SECOND, FIRST, torch.device("cuda")):
        with devices.current(each):
            pass
    assert made == [FIRST, torch.device("cuda")]


def test_the_stream_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 100 + index, raising=False)
    assert devices.stream_of(CPU) is None
    assert [devices.stream_of(device) for device in (FIRST, SECOND)] == [100, 101]
