"""What a store's features stand for: score matrices, statistics, truth, pictures and a report, without running FLUX.

`analyze.scores.run(ScoresSettings(...))` and `python -m analyze scores …` are the same thing, and so for the others.
"""
