"""`vllm-buddy orders`: measure in which order static pruning takes layers out, and keep it."""

import argparse

from vllm_buddy.baselines.static_settings import OrdersSettings
from vllm_buddy.cli.progress import print_progress
from vllm_buddy.cli.setting_options import add_setting_options, read_settings
from vllm_buddy.errors import BaselineError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each field of OrdersSettings."""
    add_setting_options(parser, OrdersSettings, positional=("out",))


def run(args: argparse.Namespace) -> int:
    """Write the orders, one by one as they are ready; returns 0.

    Raises:
        BuddyError: unknown method, OUT of another model, or the model or the text cannot be used.
    """
    settings = read_settings(OrdersSettings, args, BaselineError)
    from vllm_buddy.artifact.fingerprint import identify
    from vllm_buddy.baselines import OrderFile, measure_order
    from vllm_buddy.importance import CalibrationText
    from vllm_buddy.models.embedded import fetch

    text = CalibrationText.read(settings.text)
    folder = settings.model or fetch()
    base = identify(folder, settings.base_model_id)
    file = OrderFile.load(settings.out) if settings.out.exists() else OrderFile(base_model=base)
    if not file.base_model.same_model(base):
        raise BaselineError(f"{settings.out} holds orders of {file.base_model.summary()}, not of {base.summary()}")
    for name in settings.methods:
        order = measure_order(name, folder, text, settings.tokens, settings.window, print_progress)
        file = file.with_order(order)
        file.save(settings.out)
        print(f"{name}: {' '.join(map(str, order.layers))}", flush=True)
    return 0
