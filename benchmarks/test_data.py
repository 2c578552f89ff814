"""Tokenizer, masking, packing: the cases of albert_fast.bench.suites.data."""


def test_data(measure):  # type: ignore[no-untyped-def]
    measure()
