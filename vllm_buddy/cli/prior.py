"""`vllm-buddy prior`: measures layer importance and writes an artifact that follows it."""

import argparse

from vllm_buddy.artifact import CONFIG_FILE
from vllm_buddy.cli.device_memory import says_what_saves_memory
from vllm_buddy.cli.new_folder import require_new_folder
from vllm_buddy.cli.progress import note, print_progress
from vllm_buddy.cli.setting_options import add_setting_options, read_settings
from vllm_buddy.errors import CalibrationError
from vllm_buddy.importance.prior_settings import PriorSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option for each field of PriorSettings."""
    add_setting_options(parser, PriorSettings, positional=("model_dir", "out"))


@says_what_saves_memory("lower --window, or give --dtype bfloat16 or --device cpu")
def run(args: argparse.Namespace) -> int:
    """Measure and write the artifact; returns 0.

    Raises:
        BuddyError: a setting, the model or the text cannot be used, or OUT is not empty or cannot be written.
    """
    settings = read_settings(PriorSettings, args, CalibrationError)
    out = settings.out
    require_new_folder(out, CalibrationError)
    from vllm_buddy.artifact.provenance import CARD_FILE, RUN_FILE, source_commit
    from vllm_buddy.importance.build import build_prior
    from vllm_buddy.importance.prior_record import model_card, run_record
    from vllm_buddy.models.find import find_model

    commit = source_commit()
    result = build_prior(settings, find_model(settings.model_dir, note), print_progress)
    result.artifact.save(out)
    try:
        (out / CARD_FILE).write_text(model_card(result, settings))
        (out / RUN_FILE).write_text(run_record(result, settings, commit))
    except OSError as error:
        raise CalibrationError(f"cannot write the card of the artifact to {out}: {error.strerror or error}") from None
    for name, row in result.perplexity.items():
        figures = ", ".join(f"{value:,.1f} at {budget:g}" for budget, value in row.items())
        print(f"perplexity by budget, {name}: {figures}")
    print(f"wrote artifact '{result.artifact.config.name}': {out / CONFIG_FILE} and the files beside it")
    return 0
