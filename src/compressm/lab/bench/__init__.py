"""`compressm bench`: our scans, training steps and reductions beside those of others, and beside the machine's limits.

suites      what is compared: the rows
ours, peers_*   the two sides of a row, each in a process of its own (`worker`)
rows        measures a row: both sides in turn
roofline    what the machine could do at best: operations and bytes by formula, rates by measurement
results     the result file, the table and the plots
"""
