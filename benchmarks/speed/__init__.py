"""Speed on this machine: decoding, prefill, mixed budgets, serving, overload, memory."""
