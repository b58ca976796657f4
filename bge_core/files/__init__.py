"""What stands on disk between the stages: read with file and line in every error, written whole or not at all.

text: when two texts are the same. records: the JSON-lines formats. atomic: writing and manifests. sources: JSON lines,
Parquet, folders, hub datasets. tables: raw files of any kind. pairs: questions and answers, and their split.
"""
