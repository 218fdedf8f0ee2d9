"""A model of a server under load, in simulated time: vLLM's queue, chunked prefill and batches, and budget "auto".

A step runs one token of each request that decodes, and fills the rest of its token limit with prompt tokens in the
order of arrival. It takes

    seconds = (base + layer * union * (1 + row * (tokens - 1))) * noise ,

where union is the number of layers of the deepest request in it, as with nested paths, and noise is log-normal. Budgets
are chosen by the real BudgetChooser from latencies that the real LatencyMeter measures; this module does what the
scheduler does around them. All is drawn from seeds, so that results are the same everywhere.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_buddy.method import FoldedDecision, FoldedPredictor
from vllm_buddy.serving.admission.auto_limits import AutoLimits
from vllm_buddy.serving.admission.chooser import BudgetChooser, Terms
from vllm_buddy.serving.admission.latency import LatencyMeter

VOCAB_SIZE = 256
MAX_TOKENS = MAX_SEQS = 16  # of a step, as in benchmarks.speed.overload
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 128


@dataclass(frozen=True)
class StepTime:
    """What a step takes, in seconds. noise: standard deviation of its logarithm."""

    base: float = 0.002
    layer: float = 0.0003
    row: float = 0.06
    noise: float = 0.05

    def seconds(self, union: int, tokens: int, generator: np.random.Generator) -> float:
        """Draw the time of a step of so many tokens, of which the deepest runs `union` layers."""
        work = self.base + self.layer * union * (1 + self.row * (tokens - 1))
        return work * float(np.exp(self.noise * generator.standard_normal()))


@dataclass
class _Request:
    name: str
    excess: np.ndarray
    depth: int
    terms: Terms
    prompt_left: int
    tokens_left: int
    layers: int = 0  # executed
    tokens: int = 0


@dataclass
class Trace:
    """What happened, each with the second in which it did.

    itl: seconds between two tokens. ttft: seconds from arrival to first token, at the arrival. budgets: mean share of
    layers of a request, at its end. levels: level, terms and number of requests in the server, after each step.
    unreachable: whether an objective was said to be out of reach, where that changed.
    """

    itl: list[tuple[float, float]] = field(default_factory=list)
    ttft: list[tuple[float, float]] = field(default_factory=list)
    budgets: list[tuple[float, float]] = field(default_factory=list)
    levels: list[tuple[float, float, Terms, int]] = field(default_factory=list)
    unreachable: list[tuple[float, bool]] = field(default_factory=list)


class SimulatedServer:
    """A server and its clock.

    chooser: as the settings of a server make it, with its limits.
    """

    def __init__(
        self, chooser: BudgetChooser, limits: AutoLimits, step_time: StepTime | None = None, seed: int = 0
    ) -> None:
        self.now = 0.0
        self.trace = Trace()
        self._chooser = chooser
        self._limits = limits
        self._step_time = step_time or StepTime()
        self._generator = np.random.default_rng(seed)
        self._meter = LatencyMeter(lambda: self.now)
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._arrived: dict[str, float] = {}
        self._last_token: dict[str, float] = {}

    def serve(self, arrivals: Sequence[float], prompts: Sequence[int], *, output: int = OUTPUT_TOKENS) -> Trace:
        """Serve requests until all have ended. arrivals: seconds, ascending. prompts: their only token each."""
        due = deque(zip(arrivals, prompts))
        while due or self._waiting or self._running:
            if not self._waiting and not self._running:
                self.now = max(self.now, due[0][0])
            while due and due[0][0] <= self.now:
                at, prompt = due.popleft()
                self._arrive(at, prompt, output)
            self._step()
        return self.trace

    def _arrive(self, at: float, prompt: int, output: int) -> None:
        name, now, self.now = f"r{len(self._arrived)}", self.now, at
        self._meter.arrives(name)
        self.now = now
        self._observe(idle=False)
        excess = self._chooser.take_in([prompt])
        choice = self._chooser.choose(self._limits.budget(), excess)
        self._arrived[name] = at
        self._waiting.append(_Request(name, excess, choice.depth, choice.terms, PROMPT_TOKENS, output))

    def _step(self) -> None:
        self._lower_running()
        starting = []
        while self._waiting and len(self._running) < MAX_SEQS and self._room() > 0:
            starting.append(self._waiting.popleft())
            self._start(starting[-1])
        self._meter.starts(request.name for request in starting)
        room, scheduled = MAX_TOKENS, []
        for request in self._running:
            tokens = min(room, request.prompt_left or 1)
            room -= tokens
            if tokens:
                scheduled.append((request, tokens))
        union = max(request.depth for request, _ in scheduled)
        self.now += self._step_time.seconds(union, MAX_TOKENS - room, self._generator)
        got = []
        for request, tokens in scheduled:
            request.layers += tokens * request.depth
            request.tokens += tokens
            request.prompt_left = max(0, request.prompt_left - tokens)
            if request.prompt_left == 0:
                got.append(request)
        self._meter.gets_token(request.name for request in got)
        for request in got:
            self._record_token(request)
        self._observe(idle=not self._running and not self._waiting)

    def _start(self, request: _Request) -> None:
        if self._chooser.objectives is not None:  # as the scheduler does
            choice = self._chooser.choose(self._limits.budget(), request.excess)
            request.terms, request.depth = choice.terms, choice.depth
        self._running.append(request)

    def _room(self) -> int:
        return MAX_TOKENS - sum(request.prompt_left or 1 for request in self._running)

    def _record_token(self, request: _Request) -> None:
        if (last := self._last_token.get(request.name)) is None:
            self.trace.ttft.append((self._arrived[request.name], self.now - self._arrived[request.name]))
        else:
            self.trace.itl.append((self.now, self.now - last))
        self._last_token[request.name] = self.now
        request.tokens_left -= 1
        if request.tokens_left == 0:
            self._running.remove(request)
            self._meter.ends(request.name)
            self.trace.budgets.append((self.now, request.layers / request.tokens / self._limits.num_layers))

    def _lower_running(self) -> None:
        for request in self._running:
            if request.prompt_left == 0 and self._chooser.terms.harder_than(request.terms):
                choice = self._chooser.choose(self._limits.budget(), request.excess)
                request.terms, request.depth = choice.terms, min(request.depth, choice.depth)

    def _observe(self, *, idle: bool) -> None:
        chooser = self._chooser
        chooser.observe(len(self._waiting), len(self._running), 0.0)
        chooser.observe_latencies(self._meter.take(), idle=idle)
        self.trace.levels.append((self.now, chooser.level, chooser.terms, len(self._waiting) + len(self._running)))
        if chooser.objectives is not None:
            unreachable = chooser.objectives.unreachable
            if not self.trace.unreachable or self.trace.unreachable[-1][1] != unreachable:
                self.trace.unreachable.append((self.now, unreachable))


def drawn_predictor(depths: Sequence[int], num_layers: int, seed: int = 0) -> FoldedPredictor:
    """Draw a predictor: prompts differ, and the fewer layers are left, the more it costs to leave out the next."""
    generator = np.random.default_rng(seed)
    gaps = len(depths) - 1
    table = 0.4 * generator.standard_normal((VOCAB_SIZE, gaps)).astype(np.float32)
    b2 = np.log(np.expm1(np.linspace(0.25, 0.04, gaps))).astype(np.float32)
    none = np.zeros(gaps, np.float32)
    decision = FoldedDecision(table, np.zeros_like(table), none, np.eye(gaps, dtype=np.float32), b2)
    return FoldedPredictor(decision, tuple(depths), num_layers)


def arrivals(kind: str, rate: float, seconds: float, seed: int) -> np.ndarray:
    """Draw the seconds at which requests arrive, ascending; never evenly, always as a Poisson process.

    kind: step, at `rate` from the first second on; ramp, from a tenth of it to all of it; burst, at two fifths of it,
    and at one and two thirds of the time 32 at once.
    """
    generator = np.random.default_rng(seed)
    times = np.cumsum(generator.exponential(1 / rate, int(2 * rate * seconds)))
    times = times[times < seconds]
    share = generator.random(len(times))
    if kind == "ramp":
        return times[share < 0.1 + 0.9 * times / seconds]
    if kind == "burst":
        return np.sort(np.concatenate([times[share < 0.4], *(np.full(32, seconds * n / 3) for n in (1, 2))]))
    return times
