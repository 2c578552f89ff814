"""Inference of the whole model: the cases of albert_fast.bench.suites.model."""


def test_model(measure):  # type: ignore[no-untyped-def]
    measure()
