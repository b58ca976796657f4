"""From rows to a trained encoder; the loop that uses it is train.py.

build: what settings ask for. data: which rows, which passages, which rank. batch: a micro-batch. step: its gradient.
optim: AdamW, learning rate, moving average. random_state: where dropout comes from. progress: what the loop remembers.
checkpoint: files of a training state. run_folder: begin or go on. preflight, plan: told before step 1.
"""
