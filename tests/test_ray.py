"""The request router for Ray Serve LLM, without a cluster; tests/examples starts one. Skipped without Ray."""

import asyncio
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
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
    request = CompletionRequest(model="m", prompt="p", vllm_xargs=options or None)
    return SimpleNamespace(args=[request], routing_context=SimpleNamespace(should_backoff=False))


def ranked(made: Any, pending: Any, *names: str) -> list[list[str]]:
    """The names of the replicas in the order in which Ray tries them."""
    found = asyncio.run(made.choose_replicas(replicas(*names), pending))
    return [[replica.replica_id.unique_id for replica in rank] for rank in found]


def test_without_ray_the_module_says_what_to_install() -> None:
    """Fails if a user without Ray is told of a module that is missing, and installs the extra that pins vLLM."""
    code = "import sys; sys.modules['ray'] = None; import vllm_buddy.ray"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'ray[serve]==2.60.0'" in done.stderr.splitlines()[-1]


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
    others = [SimpleNamespace(args=args, routing_context=SimpleNamespace()) for args in ([], ["adapter"])]
    for pending in others:
        pending.routing_context.should_backoff = False
    for pending in (None, *others, completion(budget=7)):
        assert ranked(made, pending, *NAMES) == [["a", "b", "c"]]
    assert ranked(made, completion(budget=0.5)) == [[]]


@pytest.mark.usefixtures("ray_serve")
def test_a_request_that_no_replica_takes_waits_and_counts_once() -> None:
    """Fails if Ray asks again without a pause, or retries push other budgets out of their homes."""
    made, waiting = router(), completion(budget=0.5)
    for _ in range(20):
        for budget in (0.5, 1.0):
            ranked(made, completion(budget=budget), "a", "b")
    for _ in range(200):
        assert ranked(made, waiting, "a", "b") == [["a"], ["b"]]
    assert waiting.routing_context.should_backoff
    assert ranked(made, completion(budget=1.0), "a", "b") == [["b"], ["a"]]


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
def test_what_a_replica_has_said_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a burst of another router's requests turns a budget away from its replica for good."""
    from vllm_buddy import ray

    made, now = router(spill=2), 100.0
    monkeypatch.setattr(ray.time, "monotonic", lambda: now)
    for _ in range(20):
        for budget in (0.5, 1.0):
            ranked(made, completion(budget=budget), "a", "b")
    (first,) = (replica.replica_id for replica in replicas("a"))
    made.on_send_request(first)
    made.on_new_queue_len_info(first, 30)
    assert ranked(made, completion(budget=0.5), "a", "b")[0] == ["b"]
    made.decrement_queue_len_cache(first)
    assert made._load(first) == 29
    now += 11.0
    assert ranked(made, completion(budget=0.5), "a", "b")[0] == ["a"]
    assert made._load(first) == 0


@pytest.mark.usefixtures("ray_serve")
@pytest.mark.parametrize("kwargs", [{"spill": -1}, {"spill": 1.5}, {"default_budget": 0}, {"auto_budget": "auto"}])
def test_settings_that_cannot_be_had_are_refused(kwargs: dict[str, Any]) -> None:
    """Fails if a wrong setting of the router shows only as bad routing."""
    with pytest.raises(SettingsError, match="request_router_kwargs"):
        router(**kwargs)


_START = """
import asyncio, sys

from ray import cloudpickle

if sys.argv[1] == "without the package":
    sys.modules["vllm_buddy"] = None
callback = cloudpickle.load(sys.stdin.buffer)(None)
if sys.argv[1] == "with another version":
    import vllm_buddy

    vllm_buddy.__version__ = "0.0.9"
asyncio.run(callback.run_callback("on_before_node_init"))
"""


@pytest.mark.usefixtures("ray_serve")
@pytest.mark.parametrize(
    ("node", "told"),
    [
        ("with the package", None),
        ("without the package", "has no vllm_buddy ("),
        ("with another version", "has vllm_buddy 0.0.9 instead of "),
        ("with the plugin switched off", "would not load it: VLLM_BUDDY_DISABLE is set"),
    ],
)
def test_a_replica_on_a_node_that_would_serve_unrouted_does_not_start(
    node: str, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if such a node serves the model unrouted, or the operator is not told which one and what to install."""
    from ray import cloudpickle

    import vllm_buddy
    from vllm_buddy.ray import needs_plugin

    if node == "with the plugin switched off":
        monkeypatch.setenv("VLLM_BUDDY_DISABLE", "1")
    done = subprocess.run(
        [sys.executable, "-c", _START, node],
        input=cloudpickle.dumps(needs_plugin()["callback_class"]),
        capture_output=True,
    )
    error = done.stderr.decode().splitlines()[-1:]
    if told is None:
        assert done.returncode == 0, error
        return
    assert done.returncode == 1
    assert "node " in error[0]
    assert told in error[0]
    assert f"install vllm-buddy {vllm_buddy.__version__} there" in error[0]


_DEPLOY = """
import os, sys

os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

from vllm_buddy.ray import needs_plugin

model, hidden = sys.argv[1:]
config = LLMConfig(
    model_loading_config={"model_id": "m", "model_source": model},
    accelerator_config={"kind": "cpu"},
    engine_kwargs={"model_impl": "buddy"},
    callback_config=needs_plugin(),
    runtime_env={"env_vars": {"PYTHONPATH": hidden + os.pathsep + os.environ.get("PYTHONPATH", "")}},
    deployment_config={"num_replicas": 1},
    experimental_configs={"num_ingress_replicas": 1},
)
ray.init("local", num_cpus=6, include_dashboard=False)
serve.start(http_options={"port": 0})
serve.run(build_openai_app({"llm_configs": [config]}))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_deployment_on_such_a_node_fails_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if Ray does not run the check, or its message is lost on the way to who deploys."""
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    from tests.harness.tiny_models import save_tiny_model

    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "vllm_buddy.py").write_text("raise ModuleNotFoundError('hidden by a test')")
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: Ray's sockets lie in it
        monkeypatch.setenv("RAY_TMPDIR", folder)
        done = subprocess.run(
            [sys.executable, "-c", _DEPLOY, str(save_tiny_model(tmp_path / "model", "llama")), str(hidden)],
            cwd=tmp_path,  # Ray's workers look for packages where the driver was started, before PYTHONPATH
            capture_output=True,
            text=True,
            timeout=800,
        )
    told = done.stdout + done.stderr
    assert done.returncode == 1, told[-3000:]
    assert "has no vllm_buddy (hidden by a test)" in told, told[-3000:]
