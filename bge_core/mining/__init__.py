"""Hard negatives: texts that rank high for a query without being its answer.

mine: rank, judge, select. select: a pure function of one query's hits. guards: what may be an answer. teacher: scores
by a stronger model. file_checks: what is wrong with a training file. report: the page.
"""
