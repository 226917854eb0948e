"""Generators of brain volumes: what makes a volume from a row of covariates and a seed.

This package never imports :mod:`synthbrain`; the dependency goes the other way.
"""
