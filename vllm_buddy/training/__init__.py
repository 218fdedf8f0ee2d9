"""Training: stage 1 trains an artifact's router and repair, stage 2 its Budget Predictor. See docs/training.md."""
