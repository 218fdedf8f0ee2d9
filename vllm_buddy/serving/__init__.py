"""The vLLM plugin. Nothing is imported here, so that a process that needs one part loads no other."""
