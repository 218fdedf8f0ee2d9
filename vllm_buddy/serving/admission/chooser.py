"""Budget "auto": what it may choose, told at start and by requests, and the choice for a prompt under the load."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vllm_buddy.artifact import Artifact
from vllm_buddy.errors import BudgetError, SettingsError
from vllm_buddy.method import FoldedPredictor, budget_for_depth, depth_for_budget
from vllm_buddy.serving.admission.load import LoadPrice
from vllm_buddy.serving.start.settings import AUTO, BuddySettings


@dataclass(frozen=True)
class AutoBudget:
    """What one request lets the predictor choose.

    price: before load, nats per token for all layers. smallest, largest: budgets. depths: of the predictor's grid that
        these allow, ascending, at least one.
    """

    price: float
    smallest: float
    largest: float
    depths: tuple[int, ...]


@dataclass(frozen=True)
class AutoLimits:
    """What the server lets the predictor choose.

    depths: its whole grid. smallest, largest: budgets. load_price: when fully loaded; None: as `price`.
    load_floor: the smallest budget that load alone brings.
    """

    num_layers: int
    depths: tuple[int, ...]
    smallest: float
    largest: float
    price: float
    load_price: float | None
    load_floor: float

    def budget(
        self, price: float | None = None, smallest: float | None = None, largest: float | None = None
    ) -> AutoBudget:
        """What a request may choose that says this; None: as the server.

        Raises:
            BudgetError: the range has no budget of the grid.
        """
        price = self.price if price is None else price
        smallest = self.smallest if smallest is None else smallest
        largest = self.largest if largest is None else largest
        depths = self._within(smallest, largest)
        if not depths:
            raise BudgetError(
                f"the Budget Predictor has no budget in [{smallest:g}, {largest:g}]; it chooses among {self._grid()}"
            )
        return AutoBudget(price, smallest, largest, depths)

    def summary(self) -> str:
        """For the log."""
        loaded = "" if self.load_price is None else f", {self.load_price:g} when fully loaded"
        return f"among {self._grid()} at price {self.price:g}{loaded}"

    def _within(self, smallest: float, largest: float) -> tuple[int, ...]:
        low, high = (depth_for_budget(budget, self.num_layers) for budget in (smallest, largest))
        return tuple(depth for depth in self.depths if low <= depth <= high)

    def _grid(self) -> str:
        """What there is to choose from: on this server, or at all where it allows nothing of it."""
        own = [_told(d, self.num_layers, self) for d in self._within(self.smallest, self.largest)]
        return ", ".join(f"{b:g}" for b in own or [budget_for_depth(d, self.num_layers) for d in self.depths])


def auto_limits(settings: BuddySettings, artifact: Artifact, min_budget: float) -> AutoLimits | None:
    """What the settings make of the artifact's predictor; None if it has none and nothing asks for it.

    min_budget: the smallest budget that a request may ask for.

    Raises:
        SettingsError: something asks for it and the artifact has none, or the settings contradict each other.
        BudgetError: the range has no budget of the predictor's grid.
    """
    is_default = settings.default_budget == AUTO
    predictor = artifact.config.predictor
    if predictor is None:
        if not is_default and not settings.for_auto:
            return None
        ways = ["set default_budget to a number in (0, 1]"] * is_default
        ways += [f"leave out {', '.join(settings.for_auto)}"] if settings.for_auto else []
        raise SettingsError(
            f"artifact '{artifact.config.name}' has no Budget Predictor, without which there is no budget \"{AUTO}\"; "
            f"make one with `vllm-buddy train-budget`, or {' and '.join(ways)}"
        )
    smallest = min_budget if settings.auto_min is None else settings.auto_min
    largest = 1.0 if settings.auto_max is None else settings.auto_max
    limits = AutoLimits(
        num_layers=artifact.config.base_model.num_layers,
        depths=predictor.depths,
        smallest=smallest,
        largest=largest,
        price=predictor.price if settings.price is None else settings.price,
        load_price=settings.load_price,
        load_floor=smallest if settings.load_floor is None else settings.load_floor,
    )
    if smallest < min_budget:
        raise SettingsError(f"auto_min {smallest:g} is below the smallest budget a request may ask for, {min_budget:g}")
    if smallest > largest:
        lower = "the smallest budget a request may ask for" if settings.auto_min is None else "auto_min"
        raise SettingsError(f"auto_max {largest:g} is below {lower}, {smallest:g}")
    if not smallest <= limits.load_floor <= largest:
        raise SettingsError(
            f'load_floor {limits.load_floor:g} lies outside what "{AUTO}" may choose, {smallest:g} to {largest:g}'
        )
    if limits.load_price is not None and limits.load_price <= limits.price:
        raise SettingsError(
            f"load_price {limits.load_price:g} is not above the price without load, {limits.price:g}, so that load "
            "would change nothing"
        )
    if is_default or settings.for_auto:
        limits.budget()
    return limits


class Choice(NamedTuple):
    """price: the one that decided, raised by load."""

    budget: float
    depth: int
    price: float


class BudgetChooser:
    """Chooses the depth of each arriving request that has budget "auto".

    load: None if the price does not follow the load.
    """

    def __init__(self, predictor: FoldedPredictor, limits: AutoLimits, load: LoadPrice | None) -> None:
        self._predictor = predictor
        self._limits = limits
        self._load = load
        self._floor = depth_for_budget(limits.load_floor, limits.num_layers)

    @property
    def level(self) -> float:
        """Of load, in [0, 1]."""
        return 0.0 if self._load is None else self._load.level

    @property
    def price(self) -> float:
        """The server's, as it is now."""
        return self._price(self._limits.price)

    def price_of(self, asked: AutoBudget) -> float:
        """What a request that allows this would be decided at now."""
        return self._price(asked.price)

    def observe(self, num_waiting: int, num_running: int, kv_use: float) -> None:
        """Take in the server's state. kv_use: share of the KV cache in use."""
        if self._load is not None:
            self._load.observe(num_waiting, num_running, kv_use)

    def choose(self, asked: AutoBudget, token_ids: Sequence[int]) -> Choice:
        """The cheapest depth for a prompt at the present price. token_ids: of the prompt, at least one.

        A depth that only the load makes the cheapest is raised to load_floor's, or to the one without load if that is
        less.
        """
        excess = self._predictor.excess(token_ids)
        price = self._price(asked.price)
        depth = self._predictor.depth(excess, price, asked.depths)
        if price > asked.price:
            calm = self._predictor.depth(excess, asked.price, asked.depths)
            floor = next((d for d in asked.depths if d >= self._floor), asked.depths[-1])
            depth = max(depth, min(calm, floor))
        return Choice(_told(depth, self._limits.num_layers, asked), depth, price)

    def _price(self, base: float) -> float:
        return base if self._load is None else self._load.price(base)


def _told(depth: int, num_layers: int, within: AutoBudget | AutoLimits) -> float:
    """The budget of a chosen depth. The usual one may lie just outside a range whose end runs that depth, too."""
    return min(max(budget_for_depth(depth, num_layers), within.smallest), within.largest)


def budget_chooser(settings: BuddySettings, artifact: Artifact, limits: AutoLimits | None) -> BudgetChooser | None:
    """The chooser that the settings describe; None without a predictor."""
    if artifact.predictor is None or limits is None:
        return None
    load = None
    if settings.load_price is not None:
        load = LoadPrice(
            settings.load_price,
            settings.load_waiting,
            settings.load_running,
            settings.load_kv_use,
            settings.load_hysteresis,
        )
    return BudgetChooser(artifact.predictor, limits, load)
