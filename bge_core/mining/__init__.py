"""Hard negatives: texts that rank high for a query without being its answer.

mine: rows and candidates -> negatives, by these: retrieve (the ranking), filters and guards (what may be an answer),
select (the choice), teacher (scores by a stronger model). files: what is read and written. facts: what a run did.
report: the page. file_checks: what is wrong with a training file. near_duplicates: how alike two texts are.
"""

from bge_core.mining.mine import Mined as Mined
from bge_core.mining.mine import mine_hard_negatives as mine_hard_negatives
