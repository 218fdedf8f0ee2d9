"""`vllm-buddy sample`: samples text from the model itself, as training text for `vllm-buddy train`."""

import argparse
import json
import math
from pathlib import Path

from vllm_buddy.cli.progress import note
from vllm_buddy.errors import TrainingError

LONGEST_OPENER = 64  # tokens that an opener may have
OPENERS = (
    "Question: How do I",
    "Question: How to",
    "Question: What is the best way to",
    "Question: To",
    "To make",
    "To clean",
    "How to",
    "Use a",
    "The",
    "In",
    "A",
    "When",
    "Once upon a time",
    "It was",
    "The history of",
    "Scientists",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="*.jsonl file to write, with one row with `text` per sample"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="model folder (default: the embedded model)")
    parser.add_argument(
        "--tokens", type=int, default=200_000, metavar="N", help="number of tokens to sample (default: 200000)"
    )
    parser.add_argument(
        "--opener", action="append", metavar="TEXT", help="beginning of samples; several are used in turn"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=224, metavar="N", help="largest length of a sample (default: 224)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="sampling temperature (default: 0.8)"
    )
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="number of samples at once (default: 64)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the samples (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Sample with the unrouted model in vLLM and write the file; returns 0.

    Raises:
        TrainingError: a number is not positive, or OUT does not end in .jsonl or cannot be written.
    """
    if min(args.tokens, args.max_tokens, args.batch) < 1 or not 0 < args.temperature < math.inf:
        raise TrainingError("--tokens, --max-tokens, --batch and --temperature must be positive numbers")
    if args.out.suffix != ".jsonl":
        raise TrainingError(f"{args.out} must end in .jsonl, because `vllm-buddy train` goes by the suffix")
    try:
        args.out.open("a").close()  # what is there stays until there is something to write
    except OSError as error:
        raise TrainingError(f"cannot write {args.out}: {error.strerror or error}") from None
    from vllm import LLM, SamplingParams

    from vllm_buddy.models.find import find_model
    from vllm_buddy.models.kv_size import kv_bytes

    model_dir, length = find_model(args.model, note), args.max_tokens + LONGEST_OPENER
    llm = LLM(
        str(model_dir),
        dtype="bfloat16",
        max_model_len=length,
        kv_cache_memory_bytes=kv_bytes(model_dir, args.batch, length, "bfloat16"),
        max_num_seqs=args.batch,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    openers = args.opener or OPENERS
    done, number = 0, 0
    while done < args.tokens:
        wanted = math.ceil((args.tokens - done) / args.max_tokens)
        numbers = range(number, number + min(wanted, 4 * args.batch))
        prompts = [openers[i % len(openers)] for i in numbers]
        sampling = [
            SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed * 1_000_003 + i)
            for i in numbers
        ]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        with args.out.open("a" if number else "w") as file:
            for prompt, output in zip(prompts, outputs, strict=True):
                file.write(json.dumps({"text": prompt + output.outputs[0].text}) + "\n")
        done += sum(len(output.outputs[0].token_ids) for output in outputs)
        number = numbers.stop
        print(f"sampled {done} of {args.tokens} tokens", flush=True)
    return 0
