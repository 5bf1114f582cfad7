"""Published embeddings: tables of vectors, ids and positions, to a store and from one."""
