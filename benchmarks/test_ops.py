"""Each operation, forward, and forward and backward: the cases of albert_fast.bench.suites.ops."""


def test_operation(measure):  # type: ignore[no-untyped-def]
    measure()
