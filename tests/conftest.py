"""One thread a test process: two suites at once must not fight over the cores. And every draft is verified whole, since
random heads would be parked after a few rounds; what planners do is tested with planners (test_planner.py)."""

import torch

import dspark.generation

torch.set_num_threads(1)
dspark.generation.DEFAULT_PLAN = "fixed"
