"""How good frozen features are: k-NN and linear accuracy; import the submodule you need."""
