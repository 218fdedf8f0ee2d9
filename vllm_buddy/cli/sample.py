"""`vllm-buddy sample`: samples text from the model itself, as training text for `vllm-buddy train`.

With an artifact the routed model answers, so that training sees the contexts into which skipping layers leads
(on-policy distillation, arXiv 2306.13649).
"""

import argparse
import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_buddy.cli.budget_list import parse_budgets
from vllm_buddy.cli.plugin_check import require_plugin
from vllm_buddy.cli.progress import note
from vllm_buddy.data_file import DataFile
from vllm_buddy.errors import TrainingError
from vllm_buddy.serving.admission.option_names import BUDGET_KEY

if TYPE_CHECKING:
    from vllm_buddy.training.drawn_text import Draw, Drawn, Generate

ROUND = 4  # times --batch samples are drawn before rows are written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="*.jsonl file to write, with one row per sample")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="MODEL",
        help="folder, name of an embedded model, or hub id (default: the default embedded model)",
    )
    parser.add_argument(
        "--tokens", type=int, default=200_000, metavar="N", help="number of tokens to sample (default: 200000)"
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="continue the openers as plain text; otherwise a model with a chat template writes questions and answers",
    )
    parser.add_argument(
        "--opener", action="append", metavar="TEXT", help="beginning of samples, or of questions; several take turns"
    )
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="answer the `instruction` of these rows (*.json, *.jsonl), each once, instead of drawing questions",
    )
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        metavar="S",
        help="part of --questions that is used, from its beginning (default: 1)",
    )
    parser.add_argument(
        "--artifact",
        metavar="ARTIFACT",
        help="let the routed model of this artifact answer --questions: folder, name or hub id",
    )
    parser.add_argument(
        "--budgets", metavar="B,B", help="budgets of the answers with --artifact, which take turns (default: 0.5)"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=224,
        metavar="N",
        help="largest length of a sample, or of an answer (default: 224)",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="sampling temperature (default: 0.8)"
    )
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="number of samples at once (default: 64)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the samples (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Sample with vLLM and write the file; returns 0.

    Rows go to OUT.partial first, which replaces OUT when all are there.

    Raises:
        TrainingError: a number is not positive or too large for the model, options exclude each other, or OUT does
            not end in .jsonl or cannot be written.
        DataError: --questions cannot be read, or has none.
        ModelError: the model or its tokenizer cannot be used.
        ArtifactError: --artifact cannot be used, or is of another model.
        BudgetError: one of --budgets is no budget of the model.
        ServerError: vLLM would not load the plugin, and the full model would answer in the place of the routed one.
    """
    if min(args.tokens, args.max_tokens, args.batch) < 1 or not 0 < args.temperature < math.inf:
        raise TrainingError("--tokens, --max-tokens, --batch and --temperature must be positive numbers")
    if args.questions is not None and (args.plain or args.opener):
        raise TrainingError("--questions are answered as they are: leave out --plain and --opener")
    if args.artifact is not None and args.questions is None:
        raise TrainingError("--artifact answers questions: name a file of them with --questions")
    if args.budgets is not None and args.artifact is None:
        raise TrainingError("--budgets are those of routed answers: name an artifact with --artifact")
    if args.artifact is not None:
        require_plugin()
    if not 0 < args.share <= 1:
        raise TrainingError(f"--share {args.share} must be above 0 and at most 1")
    if args.share != 1 and args.questions is None:
        raise TrainingError("--share is a part of the questions: name a file of them with --questions")
    if args.out.suffix != ".jsonl" or args.out.is_dir():
        raise TrainingError(f"{args.out} must be a file that ends in .jsonl: `vllm-buddy train` goes by the suffix")
    partial = args.out.with_name(f"{args.out.name}.partial")
    with _writing(partial):
        partial.write_text("")
    try:
        _sample(args, partial)
        with _writing(args.out):
            os.replace(partial, args.out)
    finally:
        if partial.is_file() and not partial.stat().st_size:
            partial.unlink()
    return 0


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error.strerror or error}") from None


def _sample(args: argparse.Namespace, out: Path) -> None:
    from vllm_buddy.models.find import find_model
    from vllm_buddy.models.folder import load_config, load_tokenizer
    from vllm_buddy.training.drawn_text import Answerer, DrawnText, Sampler

    questions = None if args.questions is None else DataFile.read(args.questions)
    model_dir = find_model(args.model, note)
    tokenizer = load_tokenizer(model_dir)
    source: DrawnText
    if questions is None:
        source = Sampler(tokenizer, args.max_tokens, args.seed, plain=args.plain, openers=args.opener)
    else:
        source = Answerer(questions, args.share, tokenizer, args.max_tokens, args.seed)
    longest = load_config(model_dir).max_position_embeddings
    if source.length > longest:
        asked = "an opener" if questions is None else "the longest question"
        raise TrainingError(f"--max-tokens {args.max_tokens} and {asked} are beyond the model's {longest} tokens")
    routing = None if args.artifact is None else _Routing.find(args.artifact, args.budgets or "0.5", model_dir)
    generate = _generate(model_dir, source.length, args.batch, args.temperature, routing)
    for rows, done in source.rounds(args.tokens, ROUND * args.batch, generate):
        with _writing(out), out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"sampled {done} of {args.tokens} tokens", flush=True)


@dataclass(frozen=True)
class _Routing:
    """An artifact's folder, and budgets that take turns."""

    artifact: Path
    budgets: Sequence[float]

    @classmethod
    def find(cls, artifact: str, budgets: str, model_dir: Path) -> "_Routing":
        """See `run` for the arguments and errors."""
        from vllm_buddy.artifact import identify, load_artifact, resolve_artifact

        base = identify(model_dir)
        folder = resolve_artifact(artifact, lambda: base)
        load_artifact(folder).require_base(base)
        return cls(folder, parse_budgets(budgets, base.num_layers))


def _generate(
    model_dir: Path, length: int, batch: int, temperature: float, routing: _Routing | None = None
) -> "Generate":
    """Start the model in vLLM, unrouted without `routing`; returns the function that draws from it."""
    from vllm import LLM, SamplingParams

    from vllm_buddy.models.kv_size import kv_bytes
    from vllm_buddy.training.drawn_text import Drawn

    options: dict[str, Any] = {}
    if routing is not None:
        options = {"model_impl": "buddy", "additional_config": {"buddy": {"artifact": str(routing.artifact)}}}
    llm = LLM(
        str(model_dir),
        dtype="bfloat16",
        max_model_len=length,
        kv_cache_memory_bytes=kv_bytes(model_dir, batch, length, "bfloat16"),
        max_num_seqs=batch,
        enforce_eager=True,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,  # beside which seeds end vLLM's engine on CPU
        disable_log_stats=True,
        **options,
    )

    def sampling(draw: "Draw") -> SamplingParams:
        extra = None
        if routing is not None:
            extra = {BUDGET_KEY: routing.budgets[draw.seed % len(routing.budgets)]}
        return SamplingParams(temperature=temperature, max_tokens=draw.max_tokens, seed=draw.seed, extra_args=extra)

    def generate(draws: "Sequence[Draw]") -> "list[Drawn]":
        prompts: Any = [{"prompt_token_ids": draw.prompt} for draw in draws]
        outputs = (o.outputs[0] for o in llm.generate(prompts, [sampling(draw) for draw in draws], use_tqdm=False))
        return [Drawn(output.text, len(output.token_ids)) for output in outputs]

    return generate
