"""What the files of an extracted model are called; publishing them wants no more, torch least of all."""

CONFIG, WEIGHTS, CARD, PROOF = "config.json", "model.safetensors", "README.md", "proof.json"
FORMAT_FILES = {"onnx": "model.onnx", "torch_export": "model.pt2"}
FILES = (CONFIG, WEIGHTS, *FORMAT_FILES.values(), CARD, PROOF)
"""All that an extraction may write; the proof last, since it vouches for the others."""
