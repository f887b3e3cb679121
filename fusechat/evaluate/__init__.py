"""Evaluation: what a model costs in bits per byte on held-out dialogues, with intervals."""
