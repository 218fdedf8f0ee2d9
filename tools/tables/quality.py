"""Generates the tables of perplexity and accuracy, for docs/quality.md and the model cards of shipped artifacts."""

from tools.tables.results import Row, by_key, load_rows, section, table, where

_PARTS = {
    "first_part": "800,000 tokens",
    "second_part": "480,000 more",
    "third_part": "960,000 more",
    "smollm2-135m": "480,000 more, a quarter Python",
}
CHANCE = 0.5  # accuracy of guessing on PIQA


def quality_table() -> str:
    """Return the shipped artifact against the unrouted model."""
    return _quality(load_rows("quality_shipped.json"))


def token_table() -> str:
    """Return the shipped artifact whose tokens have depths of their own."""
    return _quality(load_rows("quality_token.json"))


def other_text_table() -> str:
    """Return what skipping costs on kinds of text of which the recipes train on one only."""
    texts = {
        "WikiText-2, held out": ("quality_shipped.json", "quality_token.json"),
        "technical prose": ("quality_prose.json", "quality_prose_token.json"),
        "Python": ("quality_code.json", "quality_code_token.json"),
    }
    kinds = (("per request", "buddy"), ("per token", "buddy:token"))
    lines = []
    for text, files in texts.items():
        for (kind, policy), rows in zip(kinds, map(load_rows, files), strict=True):
            found = by_key(rows, "policy", "layers", "metric")
            layers = sorted({row["layers"] for row in rows if row["policy"] == policy}, reverse=True)
            cells = [f"{over_dense(rows, policy, n):.2f} ({found[policy, n, 'kl']['value']:.2f})" for n in layers]
            lines.append([text, kind, f"{_dense(rows)['perplexity']['value']:.2f}", *cells])
    note = (
        f"Perplexity over the full model's, and in brackets KL in nats per token: {rows[0]['n']:,} tokens of each "
        "text, both shipped artifacts of SmolLM2-135M."
    )
    return section(note, ["text", "depth", "full model", *(f"{n} layers" for n in layers)], lines)


def own_model_table() -> str:
    """Return what an artifact is worth after no training, a short one and a long one."""
    artifacts = {
        "`vllm-buddy prior`: layers by importance, nothing in their place": (
            "quality_static.json",
            "taylor",
            "2 minutes",
        ),
        "`recipes/quick.yaml`: searched paths and a short training": ("quality_quick.json", "buddy", "4 minutes"),
        "the shipped artifact: [four recipes](training.md), 2,720,000 tokens": (
            "quality_shipped.json",
            "buddy",
            "2 hours",
        ),
    }
    lines = []
    for name, (file, policy, time) in artifacts.items():
        rows = load_rows(file)
        layers = sorted({row["layers"] for row in rows if row["policy"] == policy}, reverse=True)
        cells = [f"{over_dense(rows, policy, n):.2f}, {margin_kept(rows, policy, n):.0%}" for n in layers]
        lines.append([name, time, *cells])
    return "\n".join(table(["", "time on 2 cores", *(f"{n} layers" for n in layers)], lines))


def routing_table() -> str:
    """Return what choosing depths per token is worth on each kind of text."""
    rows = load_rows("quality_routing.jsonl")
    found = by_key(rows, "metric", "policy", "text", "layers")
    lines = []
    for text, layers in dict.fromkeys((row["text"], row["layers"]) for row in rows):
        gains = [found["gain", policy, text, layers] for policy in ("shuffled", "constant")]
        cells = [f"{gain['value']:.3f} ± {gain['stderr']:.3f}" for gain in gains]
        lines.append([text, str(layers), f"{found['kl', 'token', text, layers]['value']:.3f}", *cells])
    note = (
        f"`python -m benchmarks.quality.routing_worth`: KL from the full model in nats per token, on "
        f"{rows[0]['windows']} windows of each kind of text that the recipes' training has not seen, and how much more "
        "it is with the same depths dealt at random and with one depth for all tokens (± standard error of the "
        "difference). The bypass that training started from has seen a twentieth to a seventh of the three chat files; "
        f"{where(rows[0])}."
    )
    return section(note, ["text", "mean layers", "per token", "more at random", "more with one depth"], lines)


def copying_table() -> str:
    """Return how faithfully passages are copied, after each part of the training."""
    rows = load_rows("quality_copying.jsonl")
    found = by_key(rows, "artifact", "prompts", "budget")
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    lines = []
    for name, prompts in dict.fromkeys((row["artifact"], row["prompts"]) for row in rows):
        of_each = [found[name, prompts, budget] for budget in budgets]
        cells = [f"{row['copied']:.2f} ± {row['stderr']:.2f} ({row['repeated']:.2f})" for row in of_each]
        lines.append([_PARTS.get(name, name), prompts, *cells])
    note = (
        "`python -m benchmarks.quality.copying --artifacts FIRST SECOND THIRD smollm2-135m`, the artifacts after each "
        f"part of the training: {rows[0]['passages']} passages are to be proofread, greedily. "
        "Share of an answer's runs of four tokens that stand in the prompt (± standard error), and in brackets the "
        f"share that occurred in the answer before. {where(rows[0])}."
    )
    return section(note, ["trained on", "prompts", *(f"{budget:g}" for budget in budgets)], lines)


def recipes_table() -> str:
    """Return every way to choose and repair a path, all trained on the same number of tokens."""
    return _quality(load_rows("quality_recipes.json"))


def static_table() -> str:
    """Return static layer sets without any repair."""
    return _quality(load_rows("quality_static.json"))


def qwen_table() -> str:
    """Return the shipped artifact of Qwen2.5-Coder-0.5B: perplexity against static pruning, and GSM8K."""
    rows, solved = load_rows("quality_qwen.json"), load_rows("quality_qwen_gsm8k.jsonl")
    accuracy = {row["budget"]: row for row in solved}
    found = by_key(rows, "policy", "budget", "metric")
    lines = []
    for budget in sorted(accuracy, reverse=True):
        policy = "dense" if budget == 1.0 else "buddy"
        perplexity = found[policy, budget, "perplexity"]
        ratio, static = perplexity["value"] / _dense(rows)["perplexity"]["value"], ""
        if budget < 1.0:
            static = f"{found['evenly_spaced', budget, 'perplexity']['value']:,.0f}"
        right = accuracy[budget]
        lines.append(
            [
                str(perplexity["layers"]),
                f"{perplexity['value']:.2f}",
                f"{ratio:.2f}",
                *(_shown(found[policy, budget, metric]["value"], ".3f") for metric in ("kl", "agreement")),
                f"{right['accuracy']:.0%} ± {right['error']:.0%}",
                static,
            ]
        )
    tokens, questions = _dense(rows)["perplexity"]["n"], solved[0]["rows"]
    note = (
        f"{tokens:,} scored tokens of the last fifth of WikiText-2's validation split; {questions} questions of GSM8K "
        "that training has not seen, answered greedily in at most 256 tokens (± standard error). *Static*: perplexity "
        "with evenly spaced layers left out and nothing in their place."
    )
    heads = ["layers of 24", "perplexity", "over dense", "KL", "agreement", "GSM8K", "static"]
    return section(note, heads, lines)


def over_dense(rows: list[Row], policy: str, layers: int) -> float:
    """Return a policy's perplexity over that of the unrouted model."""
    found = by_key(rows, "policy", "layers", "metric")
    return float(found[policy, layers, "perplexity"]["value"] / _dense(rows)["perplexity"]["value"])


def margin_kept(rows: list[Row], policy: str, layers: int) -> float:
    """Return the share of the unrouted model's accuracy above chance that a policy keeps."""
    accuracy = by_key(rows, "policy", "layers", "metric")[policy, layers, "piqa_acc"]["value"]
    return float((accuracy - CHANCE) / (_dense(rows)["piqa_acc"]["value"] - CHANCE))


def _dense(rows: list[Row]) -> dict[str, Row]:
    return {row["metric"]: row for row in rows if row["policy"] == "dense"}


def _quality(rows: list[Row]) -> str:
    """Return a line per policy and depth: perplexity over dense, accuracy, and how much of dense's margin is kept.

    The margin is the accuracy above chance.
    """
    found = by_key(rows, "policy", "layers", "metric")
    dense = _dense(rows)
    heads = ["layers", "policy", "perplexity", "over dense", "KL", "agreement", "PIQA acc", "margin kept", "acc_norm"]
    keys = dict.fromkeys((r["layers"], r["policy"]) for r in rows if r["policy"] == "dense" or r["budget"] < 1)
    lines = []
    for layers, policy in sorted(keys, key=lambda key: -key[0]):

        def value(metric: str, layers: int = layers, policy: str = policy) -> float | None:
            row = found.get((policy, layers, metric))
            return None if row is None else row["value"]

        perplexity, accuracy = value("perplexity"), value("piqa_acc")
        over = None if perplexity is None else over_dense(rows, policy, layers)
        kept = None if accuracy is None else margin_kept(rows, policy, layers)
        cells = [
            _shown(perplexity, ",.2f"),
            _shown(over, ",.3f"),
            _shown(value("kl"), ".3f"),
            _shown(value("agreement"), ".3f"),
            _shown(accuracy, ".3f"),
            _shown(kept, ".0%"),
            _shown(value("piqa_acc_norm"), ".3f"),
            _shown(value("distinct_paths"), ".0f"),
        ]
        lines.append([str(layers), policy, *cells])
    tokens, questions, error = dense["perplexity"]["n"], dense["piqa_acc"]["n"], dense["piqa_acc"]["stderr"]
    note = (
        f"{tokens:,} scored tokens of the last fifth of WikiText-2's validation split, {questions} questions of PIQA. "
        f"Standard error of a PIQA accuracy: {error:.3f}; rows share text and questions, so differences between rows "
        "are known better than the rows themselves."
    )
    return "\n".join([*table([*heads, "paths"], lines), "", note])


def _shown(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)
