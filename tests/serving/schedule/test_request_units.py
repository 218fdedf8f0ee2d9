"""The units that a request takes as its path is decided."""

from vllm_buddy.method import LayerPath, Run, path_of
from vllm_buddy.method.kv_units import KVUnits
from vllm_buddy.serving.schedule.plan import LayerPlaces
from vllm_buddy.serving.schedule.request_units import RequestUnits

UNITS = KVUnits((0, 0, 1, 0, 1, 1))
BLOCK_SIZE = 4


class GivenRoute:
    """Paths by position, changing where it is said."""

    def __init__(self, *runs: Run, first_path: LayerPath | None = None) -> None:
        self.paths = [run.path for run in runs for _ in range(run.num_tokens)]
        self.first_path, self.decided = self.paths[0] if first_path is None else first_path, 0

    @property
    def uniform_length(self) -> int | None:
        known = self.paths[: self.decided]
        return next((i for i, path in enumerate(known) if path != self.first_path), None)

    def decide(self, end: int, _token_ids: object) -> None:
        self.decided = max(self.decided, end)

    def runs(self, start: int, num_tokens: int, _token_ids: object) -> list[Run]:
        return [Run(1, path) for path in self.paths[start : start + num_tokens]]


def test_a_layer_that_is_taken_up_later_begins_in_the_block_of_its_first_token() -> None:
    """Fails if it begins in a block that others share, or its unit gets blocks that nothing is written to."""
    route = GivenRoute(
        *(Run(n, path_of(layers)) for n, layers in ((6, (0, 2, 5)), (7, (0, 1, 5)), (9, (0, 1, 2, 3, 5))))
    )
    request = RequestUnits(UNITS, route, BLOCK_SIZE)
    assert (request.first_blocks, request.num_shared) == ([0, 0], 2)
    request.advance(6, [])
    assert request.layer_places() == LayerPlaces((0, -1, 0, -1, -1, 1), (0, 0, 0, 0, 0, 0))
    request.advance(8, [])  # layer 1, from position 6 on: its class has one layer so far, and unit 1 is there already
    assert request.layer_places() == LayerPlaces((0, 1, 0, -1, -1, 1), (0, 1, 0, 0, 0, 0))
    assert request.first_blocks == [0, 0]
    request.advance(22, [])  # layer 3, from position 13 on, the third of its class
    assert request.layer_places() == LayerPlaces((0, 1, 0, 2, -1, 1), (0, 1, 0, 3, 0, 0))
    assert (request.first_blocks, request.num_shared) == ([0, 0, 3], 2)


def test_a_unit_that_no_token_runs_any_more_does_not_grow() -> None:
    """Fails if a request pays for layers that it has left, or a layer that comes back finds no block."""
    full, half = path_of(range(6)), path_of((0, 2, 5))  # units 0, 0 and 2 at full depth
    route = GivenRoute(Run(6, full), Run(10, half), Run(2, full))
    request = RequestUnits(UNITS, route, BLOCK_SIZE)
    request.advance(6, [])
    assert request.num_blocks(6) == [2, 2, 2]
    request.advance(16, [])
    assert request.num_blocks(16) == [4, 2, 4]
    request.advance(18, [])
    assert request.num_blocks(18) == [5, 2, 5]  # 8 tokens ran the layers of unit 1, which are two blocks
    assert request.num_blocks(7) == [2, 2, 2]  # computed again


def test_a_lowered_request_has_blocks_for_whatever_its_next_token_runs() -> None:
    """Fails if a path that was looked at ahead, and is lowered before it runs, leaves a layer without a block."""
    full, half, other = path_of(range(6)), path_of((0, 2, 5)), path_of((0, 1, 5))
    route = GivenRoute(Run(4, full), Run(4, half), Run(1, other))
    request = RequestUnits(UNITS, route, BLOCK_SIZE)
    request.advance(9, [])
    assert request.num_blocks(9) == [3, 2, 3]
    route.paths[8] = half
    request.lowered(8)
    assert request.num_blocks(9) == [3, 2, 3]
    route.paths[8] = path_of((0, 1, 4, 5))
    request.lowered(8)
    assert all(most >= least for most, least in zip(request.num_blocks(9), [3, 2, 3]))


def test_how_a_request_is_cut_into_steps_does_not_matter() -> None:
    """Fails if a resumed request, which is computed in larger steps, would have its layers in other units."""
    steps = ((5, (0, 5)), (1, (0, 1, 3, 5)), (10, (0, 2, 5)), (3, (0, 4, 5)))
    runs = [Run(num_tokens, path_of(layers)) for num_tokens, layers in steps]
    whole, stepwise = (RequestUnits(UNITS, GivenRoute(*runs), BLOCK_SIZE) for _ in range(2))
    whole.advance(19, [])
    for num_tokens in range(20):
        stepwise.advance(num_tokens, [])
    assert whole.layer_places() == stepwise.layer_places()
    assert whole.first_blocks == stepwise.first_blocks
    assert stepwise.num_shared == 1
