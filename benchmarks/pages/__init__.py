"""The figures of the documentation, written from the committed results by ``python -m benchmarks.draw``.

Tables and sentences with measured figures stand between two comments in README.md and docs/*.md and are never edited by
hand. ``tests/test_docs.py`` fails when they differ from what the results give.
"""
