"""Budget "auto": chooses the depth of an arriving request from its prompt and the price of compute under the load."""

from collections.abc import Sequence
from typing import NamedTuple

from vllm_buddy.artifact import Artifact
from vllm_buddy.method import FoldedPredictor, depth_for_budget
from vllm_buddy.serving.admission.limits import AutoBudget, AutoLimits, budget_of_depth
from vllm_buddy.serving.admission.load import LoadPrice
from vllm_buddy.serving.start.settings import BuddySettings


class Choice(NamedTuple):
    """A chosen budget and its depth. price: the one that decided, raised by load."""

    budget: float
    depth: int
    price: float


class BudgetChooser:
    """Chooses the depth of each arriving request with budget "auto".

    load: None if the price does not follow the load.
    """

    def __init__(self, predictor: FoldedPredictor, limits: AutoLimits, load: LoadPrice | None) -> None:
        self._predictor = predictor
        self._limits = limits
        self._load = load
        self._floor = depth_for_budget(limits.load_floor, limits.num_layers)

    @classmethod
    def from_settings(
        cls, settings: BuddySettings, artifact: Artifact, limits: AutoLimits | None
    ) -> "BudgetChooser | None":
        """The chooser that the settings describe; None without a Budget Predictor."""
        if artifact.predictor is None or limits is None:
            return None
        load = settings.load
        follows = None
        if load is not None:
            follows = LoadPrice(load.price, load.waiting, load.running, load.kv_use, load.hysteresis)
        return cls(artifact.predictor, limits, follows)

    @property
    def level(self) -> float:
        """The level of load, in [0, 1]."""
        return 0.0 if self._load is None else self._load.level

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

    def choose(self, asked: AutoBudget, token_ids: Sequence[int]) -> Choice:
        """The cheapest depth for a prompt at the present price. token_ids: of the prompt, at least one.

        A depth that is the cheapest under load only is raised to that of load.floor, or to the one chosen without load
        if that is less.
        """
        excess = self._predictor.excess(token_ids)
        price = self._price(asked.price)
        depth = self._predictor.depth(excess, price, asked.depths)
        if price > asked.price:
            calm = self._predictor.depth(excess, asked.price, asked.depths)
            floor = next((d for d in asked.depths if d >= self._floor), asked.depths[-1])
            depth = max(depth, min(calm, floor))
        return Choice(budget_of_depth(depth, self._limits.num_layers, asked), depth, price)

    def _price(self, base: float) -> float:
        return base if self._load is None else self._load.price(base)
