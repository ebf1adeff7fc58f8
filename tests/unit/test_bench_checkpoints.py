"""What the benchmark of checkpoints makes of its measurements."""

from bench.checkpoints import _line


def test_the_share_of_undisturbed_time_counts_no_step_that_an_upload_slowed() -> None:
    """Ten steps of 100 ms, five of them slowed to 300 ms, and waits of 100 ms in all."""
    found = {"waits": [0.04, 0.06], "steps": [0.1] * 5, "busy": [0.3] * 5, "bytes": 8 << 20}
    assert _line("full", found) == "| full | 8 | 50, 60 | 5.0 % | 10.0 % | 100 | 300 |"


def test_without_an_upload_beside_a_step_both_shares_are_the_same() -> None:
    found = {"waits": [0.01], "steps": [0.1] * 10, "busy": [], "bytes": 1 << 20}
    assert _line("lora", found) == "| lora | 1 | 10, 10 | 1.0 % | 1.0 % | 100 | - |"
