"""`vllm-buddy artifacts`: what comes with the package."""

import argparse

from vllm_buddy.artifact import load_artifact, shipped_artifacts
from vllm_buddy.cli.table import format_table
from vllm_buddy.errors import ArtifactError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # nothing to choose


def run(args: argparse.Namespace) -> int:
    del args
    rows = []
    for name, folder in shipped_artifacts().items():
        config = load_artifact(folder).config
        made_by = "trained Decision Module" if config.has_decision_module else f"{config.prior.indicator} prior alone"
        rows.append([name, config.base_model.id, config.base_model.fingerprint, made_by])
    if not rows:
        raise ArtifactError("no artifact came with this installation; install the package again, from a wheel or git")
    print(format_table(["artifact", "base model", "fingerprint", "paths follow"], rows))
    return 0
