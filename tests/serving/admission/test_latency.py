"""When requests get their tokens."""

from vllm_buddy.serving.admission.latency import FirstToken, LatencyMeter


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_first_tokens_and_times_between_tokens_are_told_apart() -> None:
    """Fails if the wait in the queue counts as a time between tokens, or a preempted request starts anew."""
    clock = Clock()
    meter = LatencyMeter(clock)
    for now, name in ((0.0, "a"), (1.0, "b")):
        clock.now = now
        meter.arrives(name)
    clock.now = 2.0
    meter.starts(["a", "b"])
    clock.now = 2.5
    meter.gets_token(["a", "b", "unknown"])
    assert meter.take().first_tokens == [FirstToken(2.0, 0.5), FirstToken(1.0, 0.5)]
    clock.now = 3.0
    meter.gets_token(["a"])
    clock.now = 4.0
    meter.starts(["b"])  # resumed
    meter.gets_token(["a", "b"])
    measured = meter.take()
    assert measured.first_tokens == []
    assert measured.itls == {0.5: 1, 1.0: 1, 1.5: 1}
    assert meter.take().itls == {}


def test_a_server_that_stood_still_begins_anew() -> None:
    """Fails if an operator's pause counts as a wait, as a time to or between tokens, or as the pace of the queue."""
    clock = Clock()
    meter = LatencyMeter(clock)
    for name in ("decodes", "in prefill", "waits", "waits too"):
        meter.arrives(name)
    meter.starts(["decodes", "in prefill"])
    meter.gets_token(["decodes"])
    meter.take()
    clock.now = 60.0
    meter.goes_on()
    clock.now = 60.5
    meter.gets_token(["decodes", "in prefill"])
    measured = meter.take()
    assert measured.itls == {0.5: 1}
    assert measured.first_tokens == [FirstToken(0.0, 0.5)]
    assert measured.wait_s == 0.5
    meter.starts(["waits"])
    assert meter.take().wait_s == 0.5
    meter.gets_token(["waits"])
    assert meter.take().first_tokens == [FirstToken(0.5, 0.0)]


def test_the_wait_is_that_of_the_oldest_or_of_a_new_one_at_the_pace_of_the_queue() -> None:
    """Fails if a queue that has just formed looks short, or an idle server's pauses count as its pace."""
    clock = Clock()
    meter = LatencyMeter(clock)
    for number in range(5):  # each leaves at once: nothing is known of a queue
        clock.now = 10.0 * number
        meter.arrives(f"calm {number}")
        meter.starts([f"calm {number}"])
    for number in range(10):
        meter.arrives(f"r{number}")
    assert meter.take().wait_s == 0
    for number in range(3):
        clock.now += 0.5
        meter.starts([f"r{number}"])
    measured = meter.take()
    assert measured.now == 41.5
    assert measured.wait_s == 7 * 0.5
    clock.now += 9.0
    assert meter.take().wait_s == 10.5
    meter.starts([f"r{number}" for number in range(3, 10)])
    meter.arrives("new")  # to a server that has room: the pace of the queue is not its own
    assert meter.take().wait_s == 0
    meter.ends("new")
    meter.arrives("r9")
    meter.starts([])
    clock.now += 0.1
    assert meter.take().wait_s > 0.5
    for number in range(10):
        meter.ends(f"r{number}")  # aborted, some in the queue
    assert meter.take().wait_s == 0
