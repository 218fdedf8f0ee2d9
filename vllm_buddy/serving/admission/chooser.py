"""Budget "auto": chooses the depth of an arriving request from its prompt and the price of compute under the load."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vllm_buddy.artifact import Artifact
from vllm_buddy.method import FoldedPredictor, depth_for_budget
from vllm_buddy.serving.admission.auto_limits import AutoBudget, AutoLimits, budget_of_depth
from vllm_buddy.serving.admission.latency import Latencies
from vllm_buddy.serving.admission.load import LoadPrice
from vllm_buddy.serving.admission.price_scale import PriceScale
from vllm_buddy.serving.admission.slo import Objectives
from vllm_buddy.serving.start.settings import BuddySettings


class Choice(NamedTuple):
    """A chosen budget and its depth. price: the one that decided, raised by load."""

    budget: float
    depth: int
    price: float


class BudgetChooser:
    """Chooses the depth of each arriving request with budget "auto".

    load: None if the price does not follow the load. objectives: None if it does not keep latencies. There is at most
    one of them.
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
        self._lowerable = [place for place, depth in enumerate(predictor.depths) if depth in limits.lowerable]
        self._scale = None if objectives is None else PriceScale(limits.lowerable, limits.num_layers, limits.price)
        self._scale_price = limits.price

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
    def price(self) -> float:
        """The server's price at the present load."""
        return self._price(self._limits.price)

    def price_of(self, asked: AutoBudget) -> float:
        """The price at which a request with these options would be decided at the present load."""
        return self._price(asked.price)

    def observe(self, num_waiting: int, num_running: int, kv_use: float) -> None:
        """Take in the server's state. kv_use: share of the KV cache in use."""
        if self._load is not None:
            self._load.observe(num_waiting, num_running, kv_use)

    def observe_latencies(self, measured: Latencies, *, idle: bool) -> None:
        """Take in what requests have waited for. idle: whether there is no request left."""
        if self.objectives is not None and self._scale is not None:
            self._scale_price = self._scale.price(self.objectives.observe(measured, idle=idle))

    def take_in(self, token_ids: Sequence[int]) -> np.ndarray:
        """The excess of each depth for the prompt of an arriving request, see FoldedPredictor. It is counted once."""
        excess = self._predictor.excess(token_ids)
        if self.objectives is not None and self._scale is not None:
            self._scale.add(excess[self._lowerable])
            self._scale_price = self._scale.price(self.objectives.level)
        return excess

    def choose(self, asked: AutoBudget, excess: np.ndarray) -> Choice:
        """The cheapest depth for a prompt at the present price. excess: of the prompt, as `take_in` returns it.

        A depth that is the cheapest under load only is raised to that of load.floor or slo.floor, or to the one chosen
        without load if that is less.
        """
        price = self._price(asked.price)
        depth = self._predictor.depth(excess, price, asked.depths)
        if price > asked.price:
            calm = self._predictor.depth(excess, asked.price, asked.depths)
            floor = next((d for d in asked.depths if d >= self._floor), asked.depths[-1])
            depth = max(depth, min(calm, floor))
        return Choice(budget_of_depth(depth, self._limits.num_layers, asked), depth, price)

    def _price(self, base: float) -> float:
        if self.objectives is not None:
            return max(base, self._scale_price)
        return base if self._load is None else self._load.price(base)
