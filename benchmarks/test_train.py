"""Training: the cases of albert_fast.bench.suites.train; a call of `step` is one step with each of two batches."""


def test_training(measure):  # type: ignore[no-untyped-def]
    measure()
