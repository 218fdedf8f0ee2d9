"""KV units: the tokens are the reference's, a request on k of L layers takes k / L of the blocks, and all come back."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from tests.harness.batches import FEW, asks, batch_to_preempt, check_scenario, disturbances
from tests.harness.engine import BLOCK_SIZE, MAX_TOKENS_PER_STEP, Ask, Engine, start_engine
from tests.harness.model_runner_v2 import RUNNER
from tests.harness.tiny_models import FAMILIES, NUM_LAYERS, random_prompts
from tests.method.test_kv_units import num_units_of
from tests.serving.conftest import UNITS
from vllm_buddy.method import layers_of

BUDGETS = (1.0, 0.5, 0.75, 0.4, 0.625, 0.5, 0.875, 0.4)


def mixed(seed: int, num_tokens: int = 20) -> list[Ask]:
    """Eight requests of different prompt lengths and budgets."""
    prompts = random_prompts(len(BUDGETS), seed=seed, min_tokens=1, max_tokens=140)
    return [Ask(tuple(p), b, num_tokens) for p, b in zip(prompts, BUDGETS)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("interval", [0, 1, 4])
def test_tokens_of_divergent_paths_equal_the_reference(
    family: str, interval: int, units_of: Callable[[str], Engine]
) -> None:
    """Fails if a layer reads or writes the blocks of another unit, or takes up a unit too late."""
    engine = units_of(family)
    engine.configure("masked", interval)
    requests = mixed(seed=interval)
    engine.check(requests, engine.run(requests))
    assert engine.num_blocks_in_use == 0


def test_vllm_makes_no_metadata_for_the_units(units: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if each step pays for metadata of every KV-cache group, of which no layer reads any."""

    def made(*_args: object, **_kwargs: object) -> None:
        raise AssertionError

    v1 = RUNNER == "v1"
    monkeypatch.setattr(
        GPUModelRunner if v1 else DefaultModelState, "_build_attention_metadata" if v1 else "prepare_attn", made
    )
    units.configure("masked", 0)
    requests = mixed(seed=2)[:3]
    units.check(requests, units.run(requests))


def test_layers_are_taken_up_in_these_tests(units: Engine) -> None:
    """Fails if no request of the tests above leaves its first path for a layer that needs a unit of its own."""
    units.configure("masked", 1)
    taken = {}

    def watch(_step: int) -> None:
        for req_id, routed in units.scheduler._routed.items():
            taken[req_id] = list(routed.units.first_blocks)

    units.run(mixed(seed=1, num_tokens=40), before_step=watch)
    assert sum(first_blocks[-1] > 0 for first_blocks in taken.values()) >= 2


@pytest.mark.parametrize("interval", [0, 1])
@pytest.mark.parametrize("chunk", [7, 33])
def test_tokens_do_not_depend_on_chunked_prefill(units: Engine, chunk: int, interval: int) -> None:
    """Fails if units are taken for the chunk and not for the tokens before it."""
    units.configure("masked", interval, chunk=chunk)
    requests = mixed(seed=4)
    units.check(requests, units.run(requests))


def test_blocks_in_use_follow_the_depth(units: Engine) -> None:
    """Fails if a request takes blocks of units that its path does not need, or shares fewer than it could."""
    layout = units.state.units
    used: list[int] = []
    for budget in (0.5, 0.75, 1.0):
        units.configure("masked", 0)
        used.clear()
        (prompt,) = random_prompts(1, seed=3, min_tokens=100, max_tokens=100)
        units.run([Ask(tuple(prompt), budget, 40)], before_step=lambda _: used.append(units.num_blocks_in_use))
        path = units.expected(Ask(tuple(prompt), budget, 40)).paths[0]
        num_blocks = -(-(100 + 39) // BLOCK_SIZE)
        assert max(used) == num_units_of(layout, path) * num_blocks
        assert num_units_of(layout, path) >= path.bit_count() / layout.num_classes
    assert max(used) == num_blocks * NUM_LAYERS / layout.num_classes


@pytest.mark.parametrize("interval", [0, 1, 4])
def test_a_repeated_batch_is_found_in_the_cache_and_gives_the_same_tokens(units: Engine, interval: int) -> None:
    """Fails if a prefix is not found in all units of its path, or in those of another."""
    units.configure("masked", interval)
    requests = [ask for ask in mixed(seed=11) if len(ask.prompt) > BLOCK_SIZE]
    first, second = units.run(requests), units.run(requests)
    units.check(requests, first)
    units.check(requests, second)
    assert [output.num_cached_tokens for output in first] == [0] * len(requests)
    for ask, output in zip(requests, second):
        assert output.num_cached_tokens == (len(ask.prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.parametrize("interval", [0, 1])
def test_one_prompt_at_many_budgets(units: Engine, interval: int) -> None:
    """Fails if a prefix of one path is found by another one, which has it in other units."""
    units.configure("masked", interval)
    (prompt,) = random_prompts(1, seed=5, min_tokens=100, max_tokens=100)
    for budget, cached in ((1.0, 0), (0.5, 0), (0.75, 0), (0.4, 0), (None, 96), (0.5, 96)):
        ask = Ask(tuple(prompt), budget, 20)
        (output,) = units.run([ask])
        units.check([ask], [output])
        assert output.num_cached_tokens == cached


def test_full_prompts(units: Engine) -> None:
    """Fails if a request that runs its prompt on all layers, and the rest on some, loses the units of the others."""
    units.configure("masked", 1)
    requests = [Ask(ask.prompt, ask.budget, 20, options={"buddy_prompt": "full"}) for ask in mixed(seed=6)]
    units.check(requests, units.run(requests))
    units.check(requests, units.run(requests))


def test_tokens_after_a_full_prompt_take_blocks_of_the_units_they_run(units: Engine) -> None:
    """Fails if each decoded token of a request that left full depth takes blocks of all units."""
    units.configure("masked", 0)
    (prompt,) = random_prompts(1, seed=3, min_tokens=2 * BLOCK_SIZE, max_tokens=2 * BLOCK_SIZE)
    ask = Ask(tuple(prompt), 0.4, 4 * BLOCK_SIZE, options={"buddy_prompt": "full"})
    used: list[int] = []
    units.check([ask], units.run([ask], before_step=lambda _: used.append(units.num_blocks_in_use)))
    layout, path = units.state.units, units.expected(ask).paths[-1]
    run = {layout.home[layer] for layer in layers_of(path)}
    assert len(run) < layout.num_units
    assert max(used) == 2 * layout.num_units + 4 * len(run)


@pytest.mark.parametrize("interval", [0, 1, 4])
def test_preempted_requests_run_their_old_paths_again(units: Engine, interval: int) -> None:
    """Fails if a resumed request has its layers in other units than before, or lacks a unit it took up late."""
    units.configure("masked", interval)
    requests = batch_to_preempt()

    def disturb(step: int) -> None:
        if step in (2, 9, 17):
            units.preempt(step)
        if step == 21:
            units.preempt_all()

    outputs = units.run(requests, before_step=disturb)
    units.check(requests, outputs)
    assert sum(o.kv_transfer_params["buddy"]["tokens"] for o in outputs) > sum(len(a.prompt) + 23 for a in requests)


@pytest.mark.parametrize("interval", [0, 1])
def test_preemption_by_vllm_when_blocks_run_out(crowded_units: Engine, interval: int) -> None:
    """Fails if vLLM gives out a block twice, or more than there are, or a request waits for ever."""
    crowded_units.configure("masked", interval)
    requests = [Ask(ask.prompt, ask.budget, 120) for ask in batch_to_preempt(seed=22)]
    preempted: list[int] = []

    def watch(_step: int) -> None:
        preempted.append(sum(request.num_preemptions for request in crowded_units.scheduler.requests.values()))

    crowded_units.check(requests, crowded_units.run(requests, before_step=watch))
    assert max(preempted) > 0
    assert crowded_units.num_blocks_in_use == 0


def test_a_prefix_is_evicted_from_its_end(crowded_units: Engine) -> None:
    """Fails if the cache loses the beginning of a prefix in one unit, so that nobody finds the rest in the others."""
    crowded_units.configure("masked", 0)
    long, other = (tuple(p) for p in random_prompts(2, seed=9, min_tokens=300, max_tokens=300))
    crowded_units.run([Ask(long, 1.0, 1)])  # 10 of 16 blocks in each of 4 units
    crowded_units.run([Ask(other[:230], 1.0, 1)])  # 8 more
    (output,) = crowded_units.run([Ask(long, 1.0, 1)])
    assert BLOCK_SIZE * 6 <= output.num_cached_tokens <= BLOCK_SIZE * 8


scenarios = given(
    interval=st.sampled_from((0, 1, 4, 16)),
    lag=st.sampled_from((0, 0, 1, 3)),
    chunk=st.sampled_from((5, 7, 33, 64, MAX_TOKENS_PER_STEP)),
    requests=st.lists(st.tuples(asks, st.integers(0, 12)), min_size=1, max_size=8),
    events=st.lists(disturbances, max_size=4),
)


@FEW
@scenarios
def test_tokens_do_not_depend_on_what_happens_beside_a_request(units_of: Callable[[str], Engine], **scenario) -> None:
    """Fails if batch-mates, arrivals, chunks, cache, preemption or aborts change a token, or leak a block."""
    engine = units_of("llama")
    check_scenario(engine, "masked", **scenario)
    assert engine.num_blocks_in_use == 0


@FEW
@scenarios
@pytest.mark.slow
def test_tokens_do_not_depend_on_it_when_blocks_run_out_either(crowded_units: Engine, **scenario) -> None:
    """The same where vLLM preempts, evicts cached blocks and gives them to others."""
    check_scenario(crowded_units, "masked", **scenario)
    assert crowded_units.num_blocks_in_use == 0


@pytest.mark.parametrize("options", [{"enable_prefix_caching": False}, {"buddy": {**UNITS, "kv_classes": 1}}], ids=str)
def test_other_starts(options: dict, tiny: Callable) -> None:
    """Fails if units need prefix caching, or blocks of more than one layer."""
    engine = start_engine(tiny("llama"), **{"buddy": UNITS, **options})
    engine.configure("masked", 1)
    requests = batch_to_preempt()
    engine.check(requests, engine.run(requests, before_step=lambda step: step == 9 and engine.preempt(0)))
    assert engine.num_blocks_in_use == 0
