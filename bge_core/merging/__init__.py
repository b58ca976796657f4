"""Several models become one, tensor by tensor.

model_folders: opened and compared. methods: how tensors are combined. folders: the result, written whole or not at all.
lm_cocktail: its two functions. Of merge.py, choose: which models with which weights. sweep: the weight, measured.
"""

from bge_core.merging.folders import merge_folders as merge_folders
from bge_core.merging.lm_cocktail import mix_models as mix_models
from bge_core.merging.lm_cocktail import mix_models_with_data as mix_models_with_data
