"""vLLM's workers and model runners, which turn the plan of a step into inputs of the model."""
