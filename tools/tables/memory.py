"""Tables of what the KV cache holds, with either layout."""

from tools.tables.results import by_key, load_rows, percent, rounds_note, section, spread, table, where

FILE = "cpu_kv_layouts.jsonl"
TALK = "cpu_conversations.jsonl"
_SERVED_TOGETHER = ("stock", "dense 0.5", "units 0.5")


def capacity_table() -> str:
    """Return the tokens that fit into one KV cache, by layout and budget."""
    rows = [row for row in load_rows(FILE) if row["metric"].startswith("kv_tokens")]
    found = by_key(rows, "metric", "variant")
    lines = []
    for budget in ("1.0", "0.75", "0.5"):
        cells = [budget]
        for variant in ("stock", f"dense {budget}", f"units {budget}"):
            ratio = found["kv_tokens_over_stock", variant]["value"]
            cells.append(f"{found['kv_tokens', variant]['value']:,.0f} ({ratio:.2f})")
        lines.append(cells)
    note = (
        "`python -m benchmarks.speed.kv_layouts`: tokens that a KV cache of 110 MiB holds, and in brackets over stock "
        f"vLLM's. Counted in blocks that {rows[0]['n']} prompts of whole blocks take, {where(rows[0])}."
    )
    return section(note, ["budget", "stock", "dense", "units"], lines)


def pressure_table() -> str:
    """Return what more requests than fit get, by layout."""
    rows = [row for row in load_rows(FILE) if "requests" in row]
    found = by_key(rows, "metric", "variant")
    lines = [
        [
            variant,
            *(spread(found[metric, variant], "{:.0f}".format) for metric in ("running_together", "preemptions")),
            spread(found["tokens_per_cpu_s_over_stock", variant]),
        ]
        for variant in _SERVED_TOGETHER
    ]
    over_dense = spread(found["tokens_per_cpu_s_over_dense", "units 0.5"])
    note = (
        f"The same command: {rows[0]['requests']} requests of 512 tokens, 128 of them decoded, arrive at once. Medians "
        f"of {rows[0]['n']} rounds with 20th to 80th percentile. Tokens per second of CPU time of one thread; units "
        f"over dense: {over_dense}."
    )
    return section(note, ["variant", "run together", "preemptions", "tokens per CPU second over stock"], lines)


def pace_table() -> str:
    """Return the time of decode steps with units, over that of the dense layout."""
    rows = [row for row in load_rows(FILE) if row["metric"] == "cpu_ms_per_step_over_dense"]
    found = by_key(rows, "batch", "budget")
    budgets = (1.0, 0.75, 0.5)
    lines = [
        [str(batch), *(spread(found[batch, budget]) for budget in budgets)]
        for batch in dict.fromkeys(row["batch"] for row in rows)
    ]
    return "\n".join(table(["batch", *(f"budget {budget}" for budget in budgets)], lines))


def conversations_table() -> str:
    """Return what conversations at mixed budgets get, by layout, KV policy and prompt mode."""
    rows = load_rows(TALK)
    found = by_key(rows, "metric", "variant")
    lines = []
    for row in (row for row in rows if row["metric"] == "hit_rate"):
        name = row["variant"]
        kinds = [row["layout"] or "", row["kv_policy"] or "", row["prompts"] or "stock vLLM, full depth"]
        over = [spread(found.get((f"{metric}_over_stock", name))) or "1" for metric in ("tokens_per_s", "ttft_ms")]
        lines.append([*kinds, percent(row["p50"]), *over])
    note = (
        "`python -m benchmarks.speed.conversations --rounds 3`: 16 users over one system prompt of 1,000 tokens, three "
        f"turns each, budgets 1.0, 0.875, 0.75 and 0.5. {rounds_note(rows)}"
    )
    heads = ["layout", "KV policy", "prompts", "prompt tokens found in the cache", "tokens/s over stock"]
    return section(note, [*heads, "time to first token over stock"], lines)


def full_prompt_table() -> str:
    """Return what prompts at full depth are worth in quality."""
    found = by_key(load_rows("quality_full_prompt.json"), "policy", "budget", "metric")
    dense = found["dense", 1.0, "perplexity"]["value"]
    lines = []
    for budget in (0.875, 0.75, 0.5):
        cells = [str(budget)]
        for name in ("buddy", "buddy:full_prompt"):
            kl, perplexity = (found[name, budget, metric]["value"] for metric in ("kl", "perplexity"))
            cells += [f"{kl:.3f}", f"{perplexity / dense:.3f}"]
        lines.append(cells)
    command = (
        "vllm-buddy eval --text wikitext2_valid.txt --text-skip 219094 --text-tokens 12288 --window 256 --context 128 "
        "--budgets 0.875,0.75,0.5 --policy buddy,buddy:full_prompt"
    )
    note = (
        f"`{command}`: the first 128 tokens of each window are the prompt, the others are scored. KL from the full "
        "model in nats per token, and perplexity over that of the full model."
    )
    heads = [f"{figure}, {prompts} prompts" for prompts in ("routed", "full") for figure in ("KL", "perplexity")]
    return section(note, ["budget", *heads], lines)
