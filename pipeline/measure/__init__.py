"""Instruments that a step can carry: phases, health, cost bands, peak, memory, and the names of all metrics.

An instrument looks and counts; nothing here knows the method, the engine or who reads it, and nothing changes a step.
"""
