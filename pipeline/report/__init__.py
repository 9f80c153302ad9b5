"""`poa report`: one HTML file that tells what became of a run."""
