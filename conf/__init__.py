"""Hydra configs, installed as draftbench.conf."""
