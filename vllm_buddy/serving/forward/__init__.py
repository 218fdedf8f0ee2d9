"""The routed forward pass: models, eager steps, compiled layers."""
