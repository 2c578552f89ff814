"""Time against one thing at a time: the cases of albert_fast.bench.suites.scaling."""


def test_scaling(measure):  # type: ignore[no-untyped-def]
    measure()
