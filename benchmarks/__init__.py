"""Paired benchmarks of cnnrnn_ext against its peers: ``python -m benchmarks``.

cases     what is computed: one row per case
peers     who computes it: one row per contender
measure   one record: correctness of the case against float64, then paired timing
limits    what the machine could do at most
report    JSON and Markdown tables; plot draws the pictures
scaling   curves over sizes and threads, and their cliffs; plot_scaling draws them
"""
