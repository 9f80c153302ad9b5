"""Images from WebDataset shards to augmented crops; import the submodule you need."""
