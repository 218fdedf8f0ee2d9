"""An arriving request: its options, what the server allows, and the choice of budget "auto"."""
