"""The parts of `scripts/lab.py`: tasks (what is run), runs (running it), numbers (what came out), page (how it is written down)."""
