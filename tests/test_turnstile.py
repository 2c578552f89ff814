"""The turnstile: one alone has nobody beside it, and nobody passes it."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from turnstile import turnstile


def test_one_alone_has_nobody_beside_it(tmp_path):
    inside: list[int] = []
    together = [0]
    done = threading.Event()

    def share(number: int) -> None:
        while not done.is_set():
            with turnstile(tmp_path, alone=False):
                inside.append(number)
                time.sleep(1e-3)
                together[0] = max(together[0], len(inside))
                inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        visits = [pool.submit(share, number) for number in range(4)]
        try:
            for _ in range(20):
                with turnstile(tmp_path, alone=True):
                    assert not inside
                    time.sleep(2e-3)
                    assert not inside
                time.sleep(5e-3)
        finally:
            done.set()
        for visit in visits:
            visit.result()
    assert together[0] > 1


def test_nobody_passes_whoever_waits(tmp_path):
    came: list[str] = []
    waits = threading.Event()

    def come(name: str, alone: bool) -> None:
        waits.set()
        with turnstile(tmp_path, alone):
            came.append(name)

    with ThreadPoolExecutor(2) as pool:
        with turnstile(tmp_path, alone=False):
            visits = []
            for name, alone in (("alone", True), ("later", False)):
                waits.clear()
                visits.append(pool.submit(come, name, alone))
                assert waits.wait(timeout=30)
                time.sleep(0.1)
            assert not came
        for visit in visits:
            visit.result()
    assert came == ["alone", "later"]


def test_a_process_forked_inside_does_not_keep_the_room(tmp_path):
    reader, writer = os.pipe()
    with turnstile(tmp_path, alone=False):
        child = os.fork()
        if child == 0:
            os.read(reader, 1)
            os._exit(0)
    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(turnstile(tmp_path, alone=True).__enter__).result(timeout=30)
        finally:
            os.write(writer, b"x")
            os.waitpid(child, 0)
            os.close(reader)
            os.close(writer)
