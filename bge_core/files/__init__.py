"""What stands on disk between the stages: read with file and line in every error, written whole or not at all.

text: when two texts are the same. records: the formats. atomic: writing, manifests, whose folder it is. sources: JSON
lines, Parquet, folders, hub datasets. Of prepare.py: tables, sheets, nested: raw files of any kind. columns, cells:
what is in their columns and cells. understood: how they were read, in words. pairs: questions and answers. split: which
of them train.
"""

from bge_core.files.atomic import write_jsonl as write_jsonl
from bge_core.files.pairs import from_triplets as from_triplets
from bge_core.files.pairs import to_triplets as to_triplets
from bge_core.files.sources import read_corpus as read_corpus
from bge_core.files.sources import read_training_rows as read_training_rows
from bge_core.files.text import normalize_text as normalize_text
from bge_core.files.text import text_id as text_id
