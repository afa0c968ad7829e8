"""How the embedded tiny models and their SAEs were made: two stages, SAEs, and the bars they reach.

python -m tools.tiny.train     # trains everything anew (about two minutes)
python -m tools.tiny.bars      # measures the shipped models against their bars
"""
