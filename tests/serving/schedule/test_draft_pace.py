"""How many drafts a request gets, and on which layers they are made."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.harness.engine import Tiny, make_tiny
from vllm_buddy.errors import SettingsError
from vllm_buddy.method import Run, layers_of
from vllm_buddy.serving.schedule.draft_pace import PROBE_EVERY, Drafting, DraftPass, DraftPasses
from vllm_buddy.serving.schedule.plan import Executed, RequestPlan
from vllm_buddy.serving.schedule.step_costs import EXPECTED_ROW
from vllm_buddy.serving.start.setting_sections import DraftSettings
from vllm_buddy.serving.start.settings import BuddySettings


def drafting(cost: float, *, num_drafts: int = 4, ngram_max: int = 0) -> Drafting:
    return Drafting(DraftPasses(DraftPass(0b1011, cost)), DraftSettings(ngram_max=ngram_max), num_drafts)


def after(server: Drafting, num_steps: int, share_right: float, num_requests: int = 1) -> list[int]:
    """Draft passes in the last 200 of num_steps steps of lossless requests, of whose drafts a share is right."""
    requests = [server.of_request(lossless=True) for _ in range(num_requests)]
    numbers, debt = [], [i / num_requests for i in range(num_requests)]
    for _ in range(num_steps):
        wanted = server.wanted([(request, 100) for request in requests], num_requests)
        numbers.append(max(by_depth for _, by_depth in wanted))
        for i, (request, (_, by_depth)) in enumerate(zip(requests, wanted)):
            accepted = 0
            while accepted < by_depth:
                debt[i] += share_right
                if debt[i] < 1.0:
                    break
                debt[i] -= 1.0
                accepted += 1
            request.last_by_depth = True
            server.observe(request, Executed(1, 8, 8, 8, (8,) * by_depth), accepted)
    return numbers[-200:]


def test_drafts_that_are_right_become_more_and_wrong_ones_cease() -> None:
    """Fails if a server goes on paying for drafts that are rejected, or cheap right ones are not used."""
    assert set(after(drafting(0.1), 400, 1.0)) == {4}
    rare = after(drafting(0.5), 400, 0.0)
    assert set(rare) == {0, 1}
    assert sum(rare) <= 200 / PROBE_EVERY + 1


@pytest.mark.parametrize("num_requests", [1, 8])
def test_what_does_not_pay_is_tried_rarely_so_that_it_costs_little(num_requests: int) -> None:
    """Fails if trying costs more than 3% where no draft is ever right: in a batch, all must try in one step."""
    server = drafting(0.5)
    after(server, 100, 0.0, num_requests)
    tried = after(server, 200, 0.0, num_requests)
    row = server.costs.expected_row
    step = 1.0 + row * (num_requests - 1)
    assert sum(tried) * (0.5 * step + num_requests * row) / (len(tried) * step) < 0.03


@pytest.mark.parametrize(("refining", "most"), [(None, 4), (DraftPass(0b1111, 0.02), 3)], ids=["plain", "refined"])
def test_a_refining_pass_makes_one_of_the_drafts(refining: DraftPass | None, most: int) -> None:
    """Fails if more drafts come out of a step than the next one has slots for."""
    settings = DraftSettings(ngram_max=0, acceptance=1.0, row_cost=0.0)
    server = Drafting(DraftPasses(DraftPass(0b1011, 0.01), refining), settings, 4)
    assert server.wanted([(server.of_request(lossless=True), 100)], 1) == [(0, most)]


def test_settings_bound_the_passes_and_say_what_is_expected_of_them() -> None:
    """Fails if drafts.most or drafts.acceptance changes nothing."""

    def wanted(**given: float) -> tuple[int, int]:
        settings = DraftSettings(**{"row_cost": 0.0, "acceptance": 1.0, **given})
        server = Drafting(DraftPasses(DraftPass(0b1011, 0.3)), settings, 4)
        return server.wanted([(server.of_request(lossless=True), 100)], 1)[0]

    assert wanted() == (4, 4)
    assert [wanted(most=most) for most in (1, 2, 9)] == [(4, 1), (4, 2), (4, 4)]  # n-grams take no passes
    assert wanted(acceptance=0.0) == (0, 0)
    assert wanted(acceptance=0.2) == (4, 0)  # which pays for rows that cost nothing, and not for passes
    assert 0 < wanted(acceptance=0.6)[1] < 4


def test_a_new_request_starts_from_what_others_have_shown() -> None:
    """Fails if each request pays again to find out that drafts are wrong on this server."""
    server = drafting(0.5)
    after(server, 60, 0.0)
    request = server.of_request(lossless=True)
    assert request.by_depth is not None
    assert request.by_depth.value < server.settings.acceptance
    assert server.wanted([(request, 100)], 1) == [(0, 0)]


@pytest.mark.parametrize(("num_allowed", "accepted"), [(0, 0), (1, 1), (2, 1)])
def test_a_draft_that_a_grammar_forbids_is_a_wrong_one(num_allowed: int, accepted: int) -> None:
    """Fails if a request whose drafts are cut short by its grammar seems to have right ones only, or none at all."""
    server = drafting(0.1)
    request = server.of_request(lossless=True)
    assert request.by_depth is not None
    request.last_by_depth, request.num_allowed = True, num_allowed
    server.observe(request, Executed(1, 8, 8, 8, (8,) * num_allowed, 3), accepted)
    known = request.by_depth
    assert (known.right, known.tried) == (0.9 * 4 * 0.7 + accepted, 0.9 * 4 + accepted + 1)
    assert request.num_allowed is None


def test_ngrams_are_looked_for_until_some_are_found() -> None:
    """Fails if a request whose text has n-grams now and then has to be lucky to find drafts again."""
    server = drafting(0.1, ngram_max=4)
    request = server.of_request(lossless=False)
    assert request.ngrams is not None
    for _ in range(20):
        request.ngrams.observe(4, 0)
    nothing = Executed(1, 8, 8, 8)
    for _ in range(PROBE_EVERY):
        assert server.wanted([(request, 100)], 1) == [(0, 0)]
        server.observe(request, nothing, 0)
    for _ in range(5):  # none is found
        assert server.wanted([(request, 100)], 1) == [(1, 0)]
        server.observe(request, nothing, 0)
    server.observe(request, Executed(1, 8, 8, 8, (8,)), 0)
    assert server.wanted([(request, 100)], 1) == [(0, 0)]


@pytest.mark.parametrize(
    ("rows", "tried"), [((0.1,) * 4, 1), ((0.3, 0.1, 0.05, 0.04), 3), ((0.0,) * 4, 4)], ids=("by row", "odd", "free")
)
def test_as_many_ngrams_are_tried_as_cost_least(rows: tuple[float, ...], tried: int) -> None:
    """Fails if each request of a batch tries all now and then, which then costs what wrong drafts cost. rows: of 1, 2,
    ... drafts, what each costs."""
    server = drafting(0.1, ngram_max=4)
    request = server.of_request(lossless=False)
    assert request.ngrams is not None
    for _ in range(60):
        request.ngrams.observe(4, 0)
    assert server._num_ngrams(request, rows) == 0
    request.steps_without_ngrams = PROBE_EVERY
    assert server._num_ngrams(request, rows) == tried


def test_text_that_changes_brings_drafts_back() -> None:
    """Fails if a server that once rejected all drafts never makes any again."""
    server = drafting(0.2, num_drafts=3)
    after(server, 300, 0.0)
    assert max(after(server, 1200, 1.0)) == 3


def test_requests_draft_together_or_not_at_all() -> None:
    """Fails if one of many requests makes the batch wait for a pass that it alone uses."""
    server = drafting(0.5)
    alone, others = server.of_request(lossless=True), [server.of_request(lossless=False) for _ in range(7)]
    for request in (alone, *others):
        if request.by_depth is not None:
            request.by_depth.observe(50, 49)
    assert server.wanted([(alone, 100)], 1)[0][1] > 0
    assert [by_depth for _, by_depth in server.wanted([(r, 100) for r in (alone, *others)], 8)] == [0] * 8


def test_large_batches_get_fewer_ngrams() -> None:
    """Fails if drafts whose rows cost more than they bring are made because they paid for one request."""
    found = []
    for num_requests in (1, 16, 256):
        server = drafting(0.5, num_drafts=5, ngram_max=4)
        found.append(server.wanted([(server.of_request(lossless=False), 100)], num_requests)[0][0])
    assert found[0] > found[1] >= found[2] == 0


def after_steps(server: Drafting, row: float, passes: float) -> tuple[int, int]:
    """Drafts of n-grams and on layers that a new request gets, after steps that took what rows and passes cost."""
    path = server.passes.drafting.path
    for n in range(300):
        rows, drafted = 1 + n % 5, n % 3
        plan = {"a": RequestPlan((Run(rows, path),), None, wanted_drafts=drafted)}
        executed = {"a": Executed(1, 8, 8, 8, drafting=3 * drafted)}
        server.observe_step(plan, executed, 0.02 * (1 + row * (rows - 1) + drafted * passes))
    return server.wanted([(server.of_request(lossless=True), 100)], 1)[0]


def test_drafts_follow_what_rows_and_passes_take() -> None:
    """Fails if a server makes drafts by expected costs although its steps show others."""
    cheap, costly = (drafting(0.3, ngram_max=4) for _ in range(2))
    assert after_steps(cheap, 0.0, 0.05) == (4, 4)
    assert after_steps(costly, 1.0, 0.9) == (0, 0)
    told = Drafting(DraftPasses(DraftPass(0b1011, 0.3)), DraftSettings(ngram_max=4, row_cost=0.05), 4)
    before = told.wanted([(told.of_request(lossless=True), 100)], 1)[0]
    assert after_steps(told, 1.0, 0.9) == before, "costs that are given are not measured"


def test_batches_follow_what_their_rows_take() -> None:
    """Fails if only a single stream's drafts follow the steps."""
    wanted = []
    for row in (0.0, 0.2):
        server = drafting(0.3, ngram_max=4)
        for n in range(600):
            rows = 8 + 8 * (n % 5)
            plan = {"a": RequestPlan((Run(rows, server.passes.drafting.path),), None)}
            server.observe_step(plan, {}, 0.02 * (1 + row * (rows - 1)))
        wanted.append(server.wanted([(server.of_request(lossless=True), 100)] * 8, 8)[0])
    assert wanted[0][0] == 4
    assert wanted[0][1] > 0
    assert wanted[1] == (0, 0)


def test_steps_with_prompts_tell_nothing() -> None:
    """Fails if the time of a prompt is taken for what rows of drafts cost."""
    server = drafting(0.3)
    plan = {"a": RequestPlan((Run(1, 1),), None), "b": RequestPlan((Run(50, 1),), None, num_prompt=50)}
    for _ in range(50):
        server.observe_step(plan, {}, 9.0)
        server.observe_step({}, {}, 9.0)
    assert server.costs.step(2) / server.costs.step(1) == pytest.approx(1.0 + EXPECTED_ROW)


def test_the_draft_path_is_the_artifacts(tiny: Callable[[str], Tiny]) -> None:
    """Fails if drafts run other layers than was asked for, or a depth that there is no path of is not refused."""
    made = tiny("llama")
    config = made.model.config
    drafts = DraftPasses.of(BuddySettings(drafts=DraftSettings(depth=4, refine_depth=6)), made.artifact, config)
    library = made.artifact.config.library
    assert library is not None
    assert layers_of(drafts.drafting.path) == library[4][0]
    assert drafts.refining is not None
    assert layers_of(drafts.refining.path) == library[6][0]
    assert 0 < drafts.drafting.cost < drafts.refining.cost < 1
    assert drafts.cost(3) == 3 * drafts.drafting.cost + drafts.refining.cost
    for wrong in (
        DraftSettings(depth=2),
        DraftSettings(depth=8),
        DraftSettings(depth=4, refine_depth=4),
        DraftSettings(depth=4, refine_depth=8),
    ):
        with pytest.raises(SettingsError, match="drafts"):
            DraftPasses.of(BuddySettings(drafts=wrong), made.artifact, config)


def test_the_artifacts_exits_draft_where_they_have_the_depth(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fails if a trained exit is not used, is used at another depth, or its adapter goes to another path."""
    made = make_tiny(tmp_path_factory.mktemp("exits"), "llama", bypass_rank=4, draft_depths=(4, 6))
    first, second = made.artifact.drafts

    def of(**drafts: int) -> DraftPasses:
        return DraftPasses.of(BuddySettings(drafts=DraftSettings(**drafts)), made.artifact, made.model.config)

    own = of()
    assert (own.drafting.path, own.drafting.adapter, own.refining) == (first.path, first.adapter, None)
    assert (
        own.summary(made.artifact) == "drafts run 4 layers with an adapter; the artifact's draft exits have 4, 6 layers"
    )
    both = of(refine_depth=6)
    assert both.drafting == own.drafting
    assert both.refining is not None
    assert (both.refining.path, both.refining.adapter) == (second.path, second.adapter)
    other = of(depth=5, refine_depth=6)
    library = made.artifact.config.library
    assert library is not None
    assert (layers_of(other.drafting.path), other.drafting.adapter) == (library[5][0], None)
    assert other.refining == both.refining
    assert "5 layers without an adapter, and 6 layers with an adapter check them" in other.summary(made.artifact)
    plain = DraftPasses.of(
        BuddySettings(drafts=DraftSettings(depth=4)), made.artifact.without_drafts(), made.model.config
    )
    assert plain.drafting.adapter is None
    assert plain.cost(1) < own.cost(1)
    assert "has no trained draft exits (`vllm-buddy train-drafts` adds them)" in plain.summary(
        made.artifact.without_drafts()
    )
    some_tokens = dataclasses.replace(made.artifact, draft_vocabulary=np.arange(9))
    some, whole = (
        DraftPasses.of(BuddySettings(drafts=DraftSettings(vocabulary=v)), some_tokens, made.model.config)
        for v in ("frequent", "all")
    )
    assert some.vocabulary is some_tokens.draft_vocabulary
    assert whole.vocabulary is None
    assert some.cost(1) < whole.cost(1) == own.cost(1)
    assert "with an adapter, and choose among 9 tokens;" in some.summary(made.artifact)
    half = both.to(torch.empty(0, dtype=torch.bfloat16))
    assert half.drafting.adapter is not None
    assert half.refining is not None
    assert half.refining.adapter is not None
    assert {half.drafting.adapter.up.dtype, half.refining.adapter.down.dtype} == {torch.bfloat16}


def test_an_exit_drafts_with_the_bypasses_of_its_gaps(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fails if an exit of its own bypasses drafts with those of each layer, or is priced by them."""
    made = make_tiny(tmp_path_factory.mktemp("gaps"), "llama", bypass_rank=4, draft_depths=(4,), draft_gaps=True)
    exit_ = made.artifact.drafts[0]
    of_layers = dataclasses.replace(made.artifact, drafts=(dataclasses.replace(exit_, bypass=None),))
    whole, layers_alone = (
        DraftPasses.of(BuddySettings(), artifact, made.model.config) for artifact in (made.artifact, of_layers)
    )
    assert whole.drafting.bypass is exit_.bypass
    assert layers_alone.drafting.bypass is None
    assert whole.cost(1) < layers_alone.cost(1), "one bypass of a rank is read for each gap, not for each layer"
    assert "with an adapter and a bypass of each gap;" in whole.summary(made.artifact)
