"""Refusal in language models, measured: prompts in, directions, steering, labels, records, figures and a paper out."""

import warnings

__version__ = "0.1.0"

# Libraries ask tqdm for its notebook bar, which complains on stderr where ipywidgets is missing; our bars need neither.
warnings.filterwarnings("ignore", message="IProgress not found")
