"""Budget "auto": chooses the depth of an arriving request from its prompt, the price of compute and the load."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vllm_buddy.artifact import Artifact
from vllm_buddy.method import FoldedPredictor, depth_for_budget
from vllm_buddy.serving.admission.auto_limits import AutoBudget, AutoLimits, budget_of_depth
from vllm_buddy.serving.admission.depth_ceiling import DepthCeiling
from vllm_buddy.serving.admission.latency import Latencies
from vllm_buddy.serving.admission.load import LoadPrice
from vllm_buddy.serving.admission.slo import Objectives
from vllm_buddy.serving.start.settings import BuddySettings


class Terms(NamedTuple):
    """What a choice is subject to at the moment.

    price: of compute, raised by load. ceiling: the greatest depth, lowered by missed objectives.
    """

    price: float
    ceiling: int

    def harder_than(self, other: "Terms") -> bool:
        """Whether they may lead to fewer layers than others do."""
        return self.price > other.price or self.ceiling < other.ceiling


class Choice(NamedTuple):
    """A chosen budget and its depth, and the terms that decided."""

    budget: float
    depth: int
    terms: Terms


class BudgetChooser:
    """Chooses the depth of each arriving request with budget "auto".

    load: raises the price; None if nothing does. objectives: lower the ceiling; None without. There is at most one of
    them.
    """

    def __init__(
        self,
        predictor: FoldedPredictor,
        limits: AutoLimits,
        load: LoadPrice | None = None,
        objectives: Objectives | None = None,
    ) -> None:
        self._predictor = predictor
        self._limits = limits
        self._load = load
        self.objectives = objectives
        self._floor = depth_for_budget(limits.load_floor, limits.num_layers)
        self._ceiling = None if objectives is None else DepthCeiling(limits.lowerable)

    @classmethod
    def from_settings(
        cls, settings: BuddySettings, artifact: Artifact, limits: AutoLimits | None
    ) -> "BudgetChooser | None":
        """The chooser that the settings describe; None without a Budget Predictor."""
        if artifact.predictor is None or limits is None:
            return None
        load, slo = settings.load, settings.slo
        follows = keeps = None
        if load is not None:
            follows = LoadPrice(load.price, load.waiting, load.running, load.kv_use, load.hysteresis)
        if slo is not None:
            keeps = Objectives(slo.objectives_s, slo.hysteresis, slo.headroom)
        return cls(artifact.predictor, limits, follows, keeps)

    @property
    def level(self) -> float:
        """The level of load, in [0, 1]."""
        follows = self._load or self.objectives
        return 0.0 if follows is None else follows.level

    @property
    def terms(self) -> Terms:
        """The server's terms at the present load."""
        return self._terms(self._limits.price)

    def terms_of(self, asked: AutoBudget) -> Terms:
        """The terms under which a request with these options would be decided at the present load."""
        return self._terms(asked.price)

    @property
    def largest_budget(self) -> float:
        """The largest budget that the objectives leave at the moment."""
        return budget_of_depth(self.terms.ceiling, self._limits.num_layers, self._limits)

    def observe(self, num_waiting: int, num_running: int, kv_use: float) -> None:
        """Take in the server's state. kv_use: share of the KV cache in use."""
        if self._load is not None:
            self._load.observe(num_waiting, num_running, kv_use)

    def observe_latencies(self, measured: Latencies, *, idle: bool) -> None:
        """Take in what requests have waited for. idle: whether there is no request left."""
        if self.objectives is not None and self._ceiling is not None:
            self._ceiling.follow(self.objectives.observe(measured, idle=idle))

    def take_in(self, token_ids: Sequence[int]) -> np.ndarray:
        """The excess of each depth for the prompt of an arriving request, see FoldedPredictor. It is counted once."""
        excess = self._predictor.excess(token_ids)
        if self._ceiling is not None:
            self._ceiling.add(self._predictor.depth(excess, self._limits.price, self._limits.lowerable))
        return excess

    def choose(self, asked: AutoBudget, excess: np.ndarray) -> Choice:
        """The cheapest depth for a prompt under the present terms. excess: of the prompt, as `take_in` returns it.

        A depth that load alone leads to is raised to that of load.floor or slo.floor, or to the one chosen without load
        if that is less.
        """
        terms = self._terms(asked.price)
        calm = self._predictor.depth(excess, asked.price, asked.depths)
        depth = calm
        if terms.price > asked.price:
            depth = self._predictor.depth(excess, terms.price, asked.depths)
        if depth > terms.ceiling:
            depth = max((d for d in asked.depths if d <= terms.ceiling), default=asked.depths[0])
        if depth < calm:
            floor = next((d for d in asked.depths if d >= self._floor), asked.depths[-1])
            depth = max(depth, min(calm, floor))
        return Choice(budget_of_depth(depth, self._limits.num_layers, asked), depth, terms)

    def _terms(self, base: float) -> Terms:
        price = base if self._load is None else self._load.price(base)
        return Terms(price, self._limits.num_layers if self._ceiling is None else self._ceiling.depth)
