"""Which network of a run to ship: what each costs on this machine, how good it is, and the best that fits a budget.

Costs are counted or timed here, quality comes from `evaluate`, models from `models`. Nothing here trains or writes into
a model.
"""
