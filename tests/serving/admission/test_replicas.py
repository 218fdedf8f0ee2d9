"""Where vLLM's client sends a request, with its own code and without an engine."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.harness.engine import Tiny
from tests.harness.server_config import configure
from tests.harness.tiny_models import NUM_LAYERS, PREDICTOR_DEPTHS
from vllm_buddy.serving import patches
from vllm_buddy.serving.admission.replicas import ReplicaChooser

ENGINES = (b"zero", b"one")


@pytest.fixture
def llama(tiny: Callable[[str], Tiny]) -> Tiny:
    return tiny("llama")


def client_of(vllm_config: Any) -> Any:
    """vLLM's client of two replicas, without their processes."""
    from vllm.v1.engine.core_client import DPLBAsyncMPClient

    patches.apply()
    client = object.__new__(DPLBAsyncMPClient)
    client.__dict__.update(
        vllm_config=vllm_config,
        core_engines=list(ENGINES),
        lb_engines=[[0, 0, 0.0], [0, 0, 0.0]],
        engine_inflight=Counter(),
        reqs_in_flight={},
        client_count=1,
        eng_start_index=0,
    )
    return client


def request(name: str = "r", rank: int | None = None, resumable: bool = False, **options: Any) -> Any:
    """A request as it leaves for the engine. options: of vllm_xargs, without `buddy_`."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    params = SamplingParams(extra_args={f"buddy_{key}": value for key, value in options.items()})
    made = EngineCoreRequest(
        request_id=name,
        prompt_token_ids=[5, 6, 7],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=rank,
        resumable=resumable,
    )
    return made


def engines_of_traffic(client: Any, num: int = 40) -> dict[float, Counter[bytes]]:
    """Requests at two budgets in turn, each finished before the next; where those after the first few went."""
    went: dict[float, Counter[bytes]] = {0.5: Counter(), 1.0: Counter()}
    for i in range(num):
        for budget in went:
            name = f"{i}-{budget}"
            engine = client.get_core_engine_for_request(request(name, budget=budget))
            client.engine_inflight[client.reqs_in_flight.pop(name)] -= 1
            if i >= 4:
                went[budget][engine] += 1
    return went


def test_each_budget_has_a_replica(llama: Tiny) -> None:
    """Fails if the choice does not reach vLLM's client, or is lost there."""
    went = engines_of_traffic(client_of(configure(llama)))
    assert went == {0.5: {b"zero": 36}, 1.0: {b"one": 36}}


@pytest.mark.parametrize(
    ("buddy", "options"), [({"affinity": {"enabled": False}}, {}), ({"nonsense": 1}, {"model_impl": "auto"})]
)
def test_vllm_balances_by_itself_where_affinity_is_off(
    llama: Tiny, buddy: dict[str, Any], options: dict[str, Any]
) -> None:
    """Fails if the setting does nothing, or a stock server is balanced by the plugin."""
    client = client_of(configure(llama, buddy, **options))
    asked = [request(str(i)) for i in range(4)]
    assert [client.get_core_engine_for_request(one) for one in asked] == [b"zero", b"one"] * 2
    assert [one.data_parallel_rank for one in asked] == [None] * 4


def test_a_rank_that_is_named_is_kept(llama: Tiny) -> None:
    """Fails if a client that names a rank, as session affinity needs, does not get it."""
    client = client_of(configure(llama))
    engines_of_traffic(client)
    assert client.get_core_engine_for_request(request("named", rank=1, budget=0.5)) == b"one"


def test_a_session_stays_where_it_began(llama: Tiny) -> None:
    """Fails if the next chunk of a streaming input is sent to a replica that does not have the first."""
    client = client_of(configure(llama))
    began = client.get_core_engine_for_request(request("session", resumable=True))
    client.engine_inflight[began] = 1000
    assert client.get_core_engine_for_request(request("session", resumable=True)) == began


def test_load_is_what_is_in_flight_or_reported(llama: Tiny) -> None:
    """Fails if requests of other API servers, or those that wait, do not count: affinity would not yield to them."""
    from vllm_buddy.serving.compat import replica_loads

    client = client_of(configure(llama))
    client.lb_engines = [[2, 3, 0.1], [0, 1, 0.1]]
    client.engine_inflight.update({b"one": 4})
    assert replica_loads(client) == ([7, 4], [7, 4])
    client.client_count = 2
    assert replica_loads(client) == ([7, 8], [7, 4])  # the second counts requests


def test_api_servers_begin_with_different_replicas(llama: Tiny) -> None:
    """Fails if the first requests of all API servers go to one replica, while the others have none."""
    began = []
    for index in (0, 1):
        client = client_of(configure(llama))
        client.eng_start_index = index
        began.append(client.get_core_engine_for_request(request("first")))
    assert began == [b"zero", b"one"]


def test_how_many_api_servers_there_are_does_not_change_the_spill(llama: Tiny) -> None:
    """Fails if a home gives requests away sooner the more API servers there are."""
    client = client_of(configure(llama, {"affinity": {"spill": 4}}))
    client.client_count = 8
    engines_of_traffic(client)
    sent = [client.get_core_engine_for_request(request(str(i), budget=0.5)) for i in range(6)]
    assert sent == [b"zero"] * 5 + [b"one"]


def test_a_few_requests_are_a_full_replica_where_few_may_run(llama: Tiny) -> None:
    """Fails if requests wait for a replica of --max-num-seqs 2 while another has none."""
    client = client_of(configure(llama, max_num_seqs=2))
    engines_of_traffic(client)
    sent = [client.get_core_engine_for_request(request(str(i), budget=0.5)) for i in range(4)]
    assert sent == [b"zero"] * 3 + [b"one"]


@pytest.mark.parametrize(("spill", "num_home"), [(0, 1), (2, 3), (8, 9)])
def test_a_replica_gives_away_what_is_more_than_the_spill(llama: Tiny, spill: int, num_home: int) -> None:
    """Fails if affinity.spill changes nothing: the operator cannot choose between depth and balance."""
    client = client_of(configure(llama, {"affinity": {"spill": spill}}))
    engines_of_traffic(client)
    sent = [client.get_core_engine_for_request(request(str(i), budget=0.5)) for i in range(num_home + 1)]
    assert sent == [b"zero"] * num_home + [b"one"]


@pytest.mark.parametrize(
    ("options", "depth"),
    [
        ({}, NUM_LAYERS),
        ({"budget": 0.5}, 4),
        ({"resumable": True}, NUM_LAYERS),
        ({"budget": "auto", "price": 0.0}, PREDICTOR_DEPTHS[-1]),
        ({"budget": "auto", "price": 1e6}, PREDICTOR_DEPTHS[0]),
    ],
)
def test_the_depth_that_a_request_is_expected_to_run(llama: Tiny, options: dict[str, Any], depth: int) -> None:
    """Fails if requests are sorted by another depth than the scheduler will give them."""
    assert ReplicaChooser(configure(llama)).depth(request(**options)) == depth
