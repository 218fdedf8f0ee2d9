"""A run of each recipe, as changes to the fixture `settings`."""

RECIPES = {
    "bypass": {"paths": "searched"},
    "bypass, static order": {"paths": "reverse"},
    "bypass by muon": {"paths": "reverse", "optimizer": "muon"},
    "bypass with a router": {"paths": "searched", "router_windows": 12, "library": 2, "decide_every": 0},
    "bypass from zeros, paths learned": {"paths": "learned", "prior": "reverse", "init_tokens": 0},
    "bypass with full prompts": {"paths": "searched", "full_prompt_share": 0.5},
    "bypass explored first": {"paths": "searched", "explore_tokens": 3 * 4 * 32, "tokens": 9 * 4 * 32},
    "distill": {"recipe": "distill", "paths": "learned", "prior": "reverse"},
    "distill, static order": {"recipe": "distill", "paths": "reverse"},
    "paper": {"recipe": "paper", "paths": "learned", "prior": "reverse", "rank": 8},
}
