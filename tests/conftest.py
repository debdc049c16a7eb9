"""Settings of every test session: no network, no display, reproducible hypothesis runs.

``tests/pure`` runs without torch, so nothing here may import it.
"""

from __future__ import annotations

import os

import hypothesis

# Set before the first test module imports torch, transformers or matplotlib.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["MPLBACKEND"] = "Agg"
os.environ["FPCOMPILE_CACHE"] = "off"  # tests measure for themselves and write nothing into a home

# Deadlines would measure the machine. `HYPOTHESIS_PROFILE=search` looks for new counter-examples.
hypothesis.settings.register_profile("repeat", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))
