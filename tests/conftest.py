"""One thread a test process: two suites at once must not fight over the cores."""

import torch

torch.set_num_threads(1)
