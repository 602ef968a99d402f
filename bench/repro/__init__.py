"""Reproduction of the papers' claims at the scale that fits, one JSON row per finished run.

python -m bench.repro run                    # all studies, resumable: rows that exist are not repeated
python -m bench.repro run --study epsd --seeds 0 1 2
python -m bench.repro tables                 # docs/reproduction.md from the rows
"""
