"""From rows to a trained encoder; the loop that uses it is train.py.

data: which rows, which passages, which rank. batch: a micro-batch. step: its gradient. optim: AdamW, learning rate,
moving average. checkpoint: files of a training state. run_folder: begin or go on. preflight, plan: told before step 1.
"""
