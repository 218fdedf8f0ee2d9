"""What a server, and one of its requests, lets the Budget Predictor choose for budget "auto"."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_buddy.artifact import Artifact
from vllm_buddy.errors import BudgetError, SettingsError
from vllm_buddy.method import budget_for_depth, depth_for_budget
from vllm_buddy.serving.start.setting_sections import AUTO
from vllm_buddy.serving.start.settings import BuddySettings


@dataclass(frozen=True)
class AutoBudget:
    """What one request lets the Budget Predictor choose.

    price: without load, nats per token for all layers. smallest, largest: budgets. depths: those of the predictor's
        grid within that range, ascending, at least one.
    """

    price: float
    smallest: float
    largest: float
    depths: tuple[int, ...]


@dataclass(frozen=True)
class AutoLimits:
    """What the server lets the Budget Predictor choose.

    depths: its whole grid. smallest, largest: budgets. load_price: when fully loaded; None: as `price`.
    load_floor: the smallest budget that load alone leads to. objectives_s: see SloSettings; empty: there are none.
    """

    num_layers: int
    depths: tuple[int, ...]
    smallest: float
    largest: float
    price: float
    load_price: float | None
    load_floor: float
    objectives_s: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_settings(cls, settings: BuddySettings, artifact: Artifact, min_budget: float) -> "AutoLimits | None":
        """What the settings allow the artifact's predictor; None if it has none and no setting asks for it.

        min_budget: the smallest budget that a request may ask for. The largest is settings.max_budget.

        Raises:
            SettingsError: a setting asks for "auto" and the artifact has no predictor, or settings contradict each
                other.
            BudgetError: the range holds no budget of the predictor's grid.
        """
        is_default = settings.default_budget == AUTO
        predictor, auto, load, slo = artifact.config.predictor, settings.auto, settings.load, settings.slo
        if predictor is None:
            if not is_default and not settings.for_auto:
                return None
            ways = ["set default_budget to a number in (0, 1]"] * is_default
            ways += [f"leave out {', '.join(settings.for_auto)}"] if settings.for_auto else []
            raise SettingsError(
                f"artifact '{artifact.config.name}' has no Budget Predictor, without which there is no budget "
                f'"{AUTO}"; make one with `vllm-buddy train-budget`, or {" and ".join(ways)}'
            )
        smallest = min_budget if auto.min is None else auto.min
        follows = load or slo
        limits = cls(
            num_layers=artifact.config.base_model.num_layers,
            depths=predictor.depths,
            smallest=smallest,
            largest=settings.max_budget if auto.max is None else auto.max,
            price=predictor.price if auto.price is None else auto.price,
            load_price=None if load is None else load.price,
            load_floor=smallest if follows is None or follows.floor is None else follows.floor,
            objectives_s={} if slo is None else slo.objectives_s,
        )
        limits._check(
            min_budget,
            settings.max_budget,
            lowest="the smallest budget a request may ask for" if auto.min is None else "auto.min",
            highest="max_budget" if auto.max is None else "auto.max",
            floor="load.floor" if slo is None else "slo.floor",
        )
        if is_default or settings.for_auto:
            limits.budget()
        return limits

    def budget(
        self, price: float | None = None, smallest: float | None = None, largest: float | None = None
    ) -> AutoBudget:
        """What a request may choose that gives these values; None: the server's.

        Raises:
            BudgetError: the range holds no budget of the grid.
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
        if self.objectives_s:
            kept = " and ".join(f"{name} within {s * 1e3:g} ms" for name, s in self.objectives_s.items())
            # The floor may lie below the grid, whose smallest depth then acts.
            least = max(self.load_floor, budget_for_depth(self.lowerable[0], self.num_layers))
            loaded = f", down to {least:g} as far as it takes to keep p99 of {kept}"
        return f"among {self._grid()} at price {self.price:g}{loaded}"

    @property
    def lowerable(self) -> tuple[int, ...]:
        """The depths of the grid among which load alone can choose, ascending."""
        return self._within(self.load_floor, self.largest)

    def _check(self, min_budget: float, max_budget: float, lowest: str, highest: str, floor: str) -> None:
        """Raise SettingsError for limits that contradict each other.

        lowest, highest: where both ends come from. floor: the setting that load_floor comes from.
        """
        if self.smallest < min_budget:
            raise SettingsError(
                f"auto.min {self.smallest:g} is below the smallest budget a request may ask for, {min_budget:g}"
            )
        if self.largest > max_budget:
            raise SettingsError(f"auto.max {self.largest:g} is above max_budget {max_budget:g}")
        if self.smallest > self.largest:
            raise SettingsError(f"{highest} {self.largest:g} is below {lowest}, {self.smallest:g}")
        if not self.smallest <= self.load_floor <= self.largest:
            raise SettingsError(
                f'{floor} {self.load_floor:g} lies outside what "{AUTO}" may choose, {self.smallest:g} to '
                f"{self.largest:g}"
            )
        if self.load_price is not None and self.load_price <= self.price:
            raise SettingsError(
                f"load.price {self.load_price:g} is not above the price without load, {self.price:g}, so that load "
                "would change nothing"
            )
        if self.objectives_s and len(self.lowerable) < 2:
            raise SettingsError(
                f'slo has no two budgets to choose between: "{AUTO}" chooses among {self._grid()}, and the smallest '
                f"that slo may lead to is {self.load_floor:g}; lower slo.floor, or raise auto.max"
            )

    def _within(self, smallest: float, largest: float) -> tuple[int, ...]:
        low, high = (depth_for_budget(budget, self.num_layers) for budget in (smallest, largest))
        return tuple(depth for depth in self.depths if low <= depth <= high)

    def _grid(self) -> str:
        """The budgets there are to choose from: this server's, or the predictor's where the server allows none."""
        own = [budget_of_depth(d, self.num_layers, self) for d in self._within(self.smallest, self.largest)]
        return ", ".join(f"{b:g}" for b in own or [budget_for_depth(d, self.num_layers) for d in self.depths])


def budget_of_depth(depth: int, num_layers: int, within: AutoBudget | AutoLimits) -> float:
    """The budget of a chosen depth, clipped to the range: the usual one may lie just outside an end with that depth."""
    return min(max(budget_for_depth(depth, num_layers), within.smallest), within.largest)
