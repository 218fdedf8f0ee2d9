"""The vLLM plugin. Only this package and the command line import vllm; nothing is imported from here by default."""
