"""Instruments that a step can carry (phases, health, cost bands, peak, memory), the names of all metrics, and where a
figure comes from (versions, commit, environment).

An instrument looks and counts; nothing here knows the method, the engine or who reads it, and nothing changes a step.
"""
