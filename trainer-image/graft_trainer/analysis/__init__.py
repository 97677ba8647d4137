"""Analyse the trained update for the report: its size and rank, the change of the hidden states, and the latency.

This package reads the tuned model and decides nothing.
"""
