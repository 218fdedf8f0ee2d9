"""`vllm-buddy orders`: measures the order in which static pruning removes layers and writes it to a file."""

import argparse

from vllm_buddy.baselines.static_settings import OrdersSettings
from vllm_buddy.cli.device_memory import says_what_saves_memory
from vllm_buddy.cli.progress import note, print_progress
from vllm_buddy.cli.setting_options import add_setting_options, read_settings
from vllm_buddy.errors import BaselineError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option for each field of OrdersSettings."""
    add_setting_options(parser, OrdersSettings, positional=("out",))


@says_what_saves_memory("lower --window, or give --dtype bfloat16 or --device cpu")
def run(args: argparse.Namespace) -> int:
    """Measure the orders and write each as soon as it is ready; returns 0.

    Raises:
        BuddyError: a method is unknown, OUT holds orders of another model or cannot be written, or the model or the
            text cannot be used.
    """
    settings = read_settings(OrdersSettings, args, BaselineError)
    from vllm_buddy.artifact.fingerprint import identify
    from vllm_buddy.baselines import OrderFile, measure_order
    from vllm_buddy.baselines.orders import check_writable
    from vllm_buddy.importance import CalibrationText
    from vllm_buddy.models.find import find_model

    text = CalibrationText.read(settings.text)
    folder = find_model(settings.model, note)
    base = identify(folder, settings.base_model_id)
    file = OrderFile.load(settings.out) if settings.out.exists() else OrderFile(base_model=base)
    if not file.base_model.same_model(base):
        raise BaselineError(f"{settings.out} holds orders of {file.base_model.summary()}, not of {base.summary()}")
    check_writable(settings.out)
    for name in settings.methods:
        order = measure_order(name, folder, text, settings, print_progress, note)
        file = file.with_order(order)
        file.save(settings.out)
        print(f"{name}: {' '.join(map(str, order.layers))}", flush=True)
    return 0
