"""Tasks that tell architectures apart, as generators of documents: pure functions of a seed and an index."""
