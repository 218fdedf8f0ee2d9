"""Server start: settings, what the device offers, what is refused, and vLLM's config hook."""
