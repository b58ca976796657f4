"""What people look at.

page: one HTML file, in the words of page.html (look, script) and parts.html (what stands on it). plots: in a page and
as PNG. tables: for a terminal. model_card: README.md of a model folder.
"""

from bge_core.reports.page import Page as Page
from bge_core.reports.tables import text_table as text_table
