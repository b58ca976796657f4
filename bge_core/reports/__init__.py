"""What people look at: the HTML page, plots, tables for a terminal, the model card."""
