"""Nearest neighbours: exact and approximate by faiss, words by BM25, and vectors kept on disk."""
