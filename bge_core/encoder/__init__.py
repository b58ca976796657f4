"""Texts to vectors: a stock transformers backbone on packed rows, pooling and normalization.

tokens: texts in one row. packing, with rectangles, fixed, varlen, kernels and dropout: attention without padding.
selfcheck: is a packed row computed like single texts? model: the module. settings: what a model folder states. load:
from a folder or the hub. encode: many texts. reranker: a cross-encoder. fingerprint: what names a model, wherever it
lies.
"""

from bge_core.encoder.load import load_encoder as load_encoder
from bge_core.encoder.model import Encoder as Encoder
