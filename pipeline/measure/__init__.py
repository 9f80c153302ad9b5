"""Instruments that a step can carry: phases, health, cost bands, peak, memory, and the names of all metrics.

An instrument looks and counts; it knows neither the method nor the engine nor who reads it.
"""
