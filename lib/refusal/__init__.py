"""Refusal in language models, measured: prompts in, directions, steering, labels, records, figures and a paper out."""

__version__ = "0.1.0"
