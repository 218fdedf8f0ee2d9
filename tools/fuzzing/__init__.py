"""What nobody should send, drawn at random: options of requests, artifacts, and requests to a server that runs."""
