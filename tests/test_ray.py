"""The request router for Ray Serve LLM, without a cluster; tests/examples starts one. Skipped without Ray."""

import asyncio
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_buddy.errors import SettingsError

NAMES = ("b", "c", "a")


@pytest.fixture
def ray_serve() -> Any:
    pytest.importorskip("vllm")
    return pytest.importorskip("ray.serve")


def router(**kwargs: Any) -> Any:
    from ray.serve._private.common import DeploymentHandleSource, DeploymentID

    from vllm_buddy.ray import BudgetRouter

    made = BudgetRouter(DeploymentID("model"), DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
    made.initialize_state(**kwargs)
    return made


def replicas(*names: str) -> list[Any]:
    from ray.serve._private.common import DeploymentID, ReplicaID

    return [SimpleNamespace(replica_id=ReplicaID(name, DeploymentID("model"))) for name in names]


def completion(**options: Any) -> Any:
    """A request as the ingress hands it to the router. options: of vllm_xargs, without `buddy_`."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    options = {f"buddy_{key}": value for key, value in options.items()}
    return SimpleNamespace(args=[CompletionRequest(model="m", prompt="p", vllm_xargs=options or None)])


def ranked(made: Any, pending: Any, *names: str) -> list[list[str]]:
    """The names of the replicas in the order in which Ray tries them."""
    found = asyncio.run(made.choose_replicas(replicas(*names), pending))
    return [[replica.replica_id.unique_id for replica in rank] for rank in found]


def test_without_ray_the_module_says_what_to_install() -> None:
    """Fails if a user without Ray is told of a module that is missing, and installs the extra that pins vLLM."""
    code = "import sys; sys.modules['ray'] = None; import vllm_buddy.ray"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'vllm-buddy[ray]'" in done.stderr.splitlines()[-1]


@pytest.mark.usefixtures("ray_serve")
def test_each_budget_has_a_replica_whatever_the_order_of_replicas() -> None:
    """Fails if budgets meet, or replicas change places when Ray lists them in another order."""
    made = router()
    chosen: Counter[tuple[float, str]] = Counter()
    for i in range(40):
        for budget in (0.5, 1.0):
            (first,), rest = ranked(made, completion(budget=budget), *(NAMES[:2] if i % 2 else NAMES[1::-1]))
            assert {first, *rest} == {"b", "c"}
            chosen[budget, first] += i >= 4
    assert +chosen == {(0.5, "b"): 36, (1.0, "c"): 36}


@pytest.mark.usefixtures("ray_serve")
@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({"budget": 0.5}, 0.5),
        ({"budget": "auto"}, 0.6),
        ({}, 0.9),
        ({"mode": "lossless"}, 1.0),
        ({"budget": 7}, None),
        ({"budget": "half"}, None),
    ],
)
def test_the_budget_that_a_request_is_sorted_by(options: dict[str, Any], budget: float | None) -> None:
    """Fails if the router reads another budget than the replica, or trips over one that is refused there."""
    made = router(default_budget=0.9, auto_budget=0.6)
    assert made._budget(completion(**options)) == budget
    assert router(default_budget="auto", auto_budget=0.6)._budget(completion()) == 0.6


@pytest.mark.usefixtures("ray_serve")
def test_what_is_no_request_for_text_goes_to_any_replica() -> None:
    """Fails if Ray's own calls, such as those for adapters, are sorted by a budget or fail."""
    made = router()
    for pending in (None, SimpleNamespace(args=[]), SimpleNamespace(args=["adapter"]), completion(budget=7)):
        assert ranked(made, pending, *NAMES) == [["a", "b", "c"]]
    assert ranked(made, completion(budget=0.5)) == [[]]


@pytest.mark.usefixtures("ray_serve")
def test_affinity_yields_to_load() -> None:
    """Fails if what Ray tells the router of sent and ended requests does not count."""
    made = router(spill=2)
    first, second = (replica.replica_id for replica in replicas("a", "b"))
    for _ in range(20):
        for budget in (0.5, 1.0):
            ranked(made, completion(budget=budget), "a", "b")

    def goes_to() -> str:
        return ranked(made, completion(budget=0.5), "a", "b")[0][0]

    assert goes_to() == "a"
    for _ in range(3):
        made.on_send_request(first)
    assert goes_to() == "b"
    made.decrement_queue_len_cache(first)
    assert goes_to() == "a"
    made.on_new_queue_len_info(first, 8)  # other routers' requests
    assert goes_to() == "b"
    made.on_new_queue_len_info(second, 3)
    assert goes_to() == "a"


@pytest.mark.usefixtures("ray_serve")
@pytest.mark.parametrize("kwargs", [{"spill": -1}, {"spill": 1.5}, {"default_budget": 0}, {"auto_budget": "auto"}])
def test_settings_that_cannot_be_had_are_refused(kwargs: dict[str, Any]) -> None:
    """Fails if a wrong setting of the router shows only as bad routing."""
    with pytest.raises(SettingsError, match="request_router_kwargs"):
        router(**kwargs)
