"""On paper, before the job: sub-networks, memory, traffic, days, and what would make it fail.

All but `doctor` follows from the config alone, without torch, a GPU or the data; `doctor` tries things out.
Nothing here trains or leaves a trace.
"""
