"""What tests share: tiny models, engines, and workers that check what they are told to do."""
