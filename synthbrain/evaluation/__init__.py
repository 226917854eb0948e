"""Evaluating cohorts: what ``synthbrain evaluate`` does.

The measures themselves are in :mod:`generation.evaluate`.
"""
