"""What the plugin tells about its work: the metrics `vllm_buddy:*`, spans, and the last chunk of a stream."""
