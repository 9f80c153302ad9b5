"""Seeing a run: what it exports to Prometheus, and what describes it there."""
