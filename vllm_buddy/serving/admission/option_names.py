"""What travels between a client and the server by name: the options of a request, and its outcome. Imports nothing.

`options.py` says what the options are and checks them.
"""

BUDGET_KEY = "buddy_budget"
CONTEXT_TOKENS_KEY = "buddy_context_tokens"
PRICE_KEY = "buddy_price"
AUTO_MIN_KEY = "buddy_auto_min"
AUTO_MAX_KEY = "buddy_auto_max"
PROMPT_KEY = "buddy_prompt"
ROUTED_PROMPT, FULL_PROMPT = "routed", "full"
MODE_KEY = "buddy_mode"
BUDGET_MODE, LOSSLESS = "budget", "lossless"
PATHS_KEY = "buddy_paths"
AUTO_KEYS = (PRICE_KEY, AUTO_MIN_KEY, AUTO_MAX_KEY)
KEYS = (BUDGET_KEY, PROMPT_KEY, MODE_KEY, CONTEXT_TOKENS_KEY, PATHS_KEY, *AUTO_KEYS)

OUTCOME_KEY = "buddy"  # of the outcome, in a response's kv_transfer_params
