"""One thread a test process: two suites at once must not fight over the cores. And where a test names no drafter or plan, the head
drafts in every round and all of it is verified: random heads would be parked (test_planner.py and test_arbiter.py test that)."""

import torch

import dspark.generation

torch.set_num_threads(1)
dspark.generation.DEFAULT_DRAFTER, dspark.generation.DEFAULT_PLAN = "dspark", "fixed"
