"""Nearest neighbours, and the vectors among which they are looked for.

exact: by faiss, the same everywhere. approximate: an index nominates. words: BM25. cache: vectors kept on disk.
"""

from bge_core.search.exact import exact_search as exact_search
