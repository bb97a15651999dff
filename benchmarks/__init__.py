"""What the penalty costs, beside the other ways of writing it and the limits of the machine.

``python -m benchmarks --quick`` measures, prints and draws in two minutes; without ``--quick`` it measures everything.
"""
