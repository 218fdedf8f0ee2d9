"""What `python -m tools.vllm_suite` is made of: it runs vLLM's own public tests with routing on."""
