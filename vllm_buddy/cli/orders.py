"""`vllm-buddy orders`: measure in which order static pruning takes layers out, and keep it."""

import argparse
from pathlib import Path as FilePath

from vllm_buddy.cli.progress import print_progress
from vllm_buddy.errors import BaselineError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from vllm_buddy.baselines import MEASURED

    parser.add_argument("out", type=FilePath, metavar="OUT", help="JSON file to write; orders of the same model stay")
    parser.add_argument("--text", type=FilePath, required=True, metavar="TEXT", help="calibration text, UTF-8")
    parser.add_argument("--model", type=FilePath, metavar="DIR", help="model folder (default: the embedded model)")
    parser.add_argument("--base-model-id", metavar="ID", help="hub id of the model (default: the folder's name)")
    parser.add_argument(
        "--methods", default=",".join(MEASURED), metavar="A,B", help=f"what to measure (default: {','.join(MEASURED)})"
    )
    defaults = ", ".join(f"{name} {method.tokens}" for name, method in MEASURED.items())
    parser.add_argument(
        "--tokens", type=int, metavar="N", help=f"tokens from the start of the text (default: {defaults})"
    )
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens per window (default: 512)")


def run(args: argparse.Namespace) -> int:
    """Write the orders, one by one as they are ready; returns 0.

    Raises:
        BuddyError: unknown method, OUT of another model, or the model or the text cannot be used.
    """
    from vllm_buddy.baselines import MEASURED, OrderFile, measure_order
    from vllm_buddy.embedded_model import fetch
    from vllm_buddy.fingerprint import identify
    from vllm_buddy.importance import CalibrationText
    from vllm_buddy.model_folder import load_model, load_tokenizer

    methods = args.methods.split(",")
    unknown = [name for name in methods if name not in MEASURED]
    if unknown:
        raise BaselineError(f"'{unknown[0]}' is not a method that is measured; known are {', '.join(MEASURED)}")
    text = CalibrationText.read(args.text)
    folder = args.model or fetch()
    base = identify(folder, args.base_model_id)
    file = OrderFile.load(args.out) if args.out.exists() else OrderFile(base_model=base)
    if not file.base_model.same_model(base):
        raise BaselineError(f"{args.out} holds orders of {file.base_model.summary()}, not of {base.summary()}")
    tokenizer = load_tokenizer(folder)
    for name in methods:
        model = load_model(folder, MEASURED[name].dtype)
        order = measure_order(name, model, tokenizer, text, args.tokens, args.window, print_progress)
        file = file.with_order(order)
        file.save(args.out)
        print(f"{name}: {' '.join(map(str, order.layers))}", flush=True)
    return 0
