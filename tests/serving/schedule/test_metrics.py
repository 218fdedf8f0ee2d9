"""The file in which metrics go from the engine's process to the API server's."""

import shutil
from pathlib import Path

from tests.harness.full_disk import full_disk
from vllm_buddy.serving.schedule.metrics import EngineMetrics


def test_a_full_disk_stops_metrics_only_as_long_as_it_is_full(tmp_path: Path) -> None:
    """Fails if a full disk ends the engine, leaves half a file to the scraper, or stops metrics for good."""
    path = tmp_path / "engine-0.prom"
    metrics = EngineMetrics(8, 0, path, has_auto=True)
    metrics.export(idle=True)
    before = path.read_text()
    metrics.observe_routing(1e-4)
    with full_disk():
        metrics.export(idle=True)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
    metrics.export(idle=True)
    assert path.read_text() != before


def test_a_folder_that_is_gone_ends_the_export(tmp_path: Path) -> None:
    """Fails if an engine that outlives its API server trips over the folder that this one removed."""
    metrics = EngineMetrics(8, 0, tmp_path / "metrics" / "engine-0.prom", has_auto=False)
    (tmp_path / "metrics").mkdir()
    metrics.export(idle=True)
    shutil.rmtree(tmp_path / "metrics")
    metrics.export(idle=True)
    assert not (tmp_path / "metrics").exists()
