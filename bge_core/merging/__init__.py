"""Models averaged: read tensor by tensor, compared, combined, written; which weight is best, measured."""

from bge_core.merging.lm_cocktail import mix_models as mix_models
from bge_core.merging.lm_cocktail import mix_models_with_data as mix_models_with_data
