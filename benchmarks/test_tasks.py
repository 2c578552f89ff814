"""Fine-tuning and what a fine-tuned model says: the cases of albert_fast.bench.suites.tasks."""


def test_task(measure):  # type: ignore[no-untyped-def]
    measure()
