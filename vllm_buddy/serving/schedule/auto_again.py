"""Decides budget "auto" again for requests that have arrived: at the price of the moment instead of their arrival's."""

from collections.abc import Iterable, Iterator

from vllm.v1.request import Request

from vllm_buddy.serving.admission.chooser import BudgetChooser
from vllm_buddy.serving.schedule.outcome import Outcome
from vllm_buddy.serving.schedule.routed_request import RoutedRequest


def choose_again(
    waiting: Iterable[tuple[Request, RoutedRequest]], chooser: BudgetChooser
) -> Iterator[tuple[Request, RoutedRequest]]:
    """Decide for requests that may leave the queue; yields those that need another route.

    A burst arrives at the price of the calm before it. Requests in the queue have run nothing yet.
    """
    for request, routed in waiting:
        if routed.asked is None or routed.excess is None or routed.planned or request.num_computed_tokens:
            continue
        if routed.chain_ended:
            continue
        if chooser.price_of(routed.asked) != routed.price:
            choice = chooser.choose(routed.asked, routed.excess)
            routed.price = choice.price
            routed.outcome = Outcome(*choice)
            if choice.depth != routed.route.depth:
                yield request, routed


def lower(running: Iterable[tuple[Request, RoutedRequest]], chooser: BudgetChooser) -> None:
    """Where the price has risen since it was decided, lower decoding requests to the new choice."""
    for request, routed in running:
        position = request.num_computed_tokens
        asked, route = routed.asked, routed.route
        if asked is None or routed.excess is None or chooser.price_of(asked) <= routed.price:
            continue
        if position < max(request.num_prompt_tokens, routed.planned):  # tokens that ran, or will run, at its depth
            continue
        choice = chooser.choose(asked, routed.excess)
        routed.price = choice.price
        route.decide(position, request.all_token_ids)  # what ran so far, accepted drafts included
        if choice.depth < route.depth:
            lowered = route.lower(choice.depth, position, request.all_token_ids)
            if lowered and routed.units is not None:
                routed.units.lowered(position)
