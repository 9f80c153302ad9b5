"""What things cost, measured on the machine at hand: a step, the data pipeline, a memory layout, the metrics.

Nothing below imports this room; every figure comes from the code that training runs.
"""
