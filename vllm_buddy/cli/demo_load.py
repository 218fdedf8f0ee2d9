"""What the demo asks at rising load: the same prompt from more and more clients, with and without budget "auto"."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from vllm_buddy.cli.chat_client import Answer, ChatClient
from vllm_buddy.serving.admission.option_names import PRICE_KEY

AT_ONCE = (1, 2, 4, 8)
# The price of the server while that many requests run: no price alone, so that "auto" begins at full depth.
SETTINGS = {"price": 12.0, "running": (1, 4)}
_BUDGETS: tuple[float | str, ...] = (1.0, "auto")


@dataclass(frozen=True)
class Burst:
    """Requests that were sent at once. ms_per_token: mean over the requests, prefill included."""

    requests: int
    budget: str
    layers_executed_mean: float
    tokens_per_s: float
    ms_per_token: float


def rising_load(client: ChatClient, prompt: str, report: Callable[[int, int], None]) -> list[Burst]:
    """Send a burst of each size, all at budget 1.0 and all at "auto". report: called with (bursts done, all)."""
    found: list[Burst] = []
    for num in AT_ONCE:
        for budget in _BUDGETS:
            options: dict[str, Any] = {PRICE_KEY: 0.0} if budget == "auto" else {}
            report(len(found), len(AT_ONCE) * len(_BUDGETS))
            start = time.perf_counter()
            with ThreadPoolExecutor(num) as pool:
                asked = [pool.submit(client.ask, prompt, budget, **options) for _ in range(num)]
            answers = [request.result() for request in asked]
            found.append(_burst(str(budget), answers, time.perf_counter() - start))
    return found


def _burst(budget: str, answers: list[Answer], wall_s: float) -> Burst:
    layers = [a.outcome["layers_executed_mean"] for a in answers if a.outcome]
    return Burst(
        requests=len(answers),
        budget=budget,
        layers_executed_mean=fmean(layers),
        tokens_per_s=sum(a.num_tokens for a in answers) / wall_s,
        ms_per_token=fmean(1000 / a.tokens_per_s for a in answers),
    )
