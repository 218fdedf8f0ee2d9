"""Other ways to fewer layers or fewer steps, on the same model and prompts."""
