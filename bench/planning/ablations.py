"""What planning is worth, by what it goes by: every source of confidences x every planner x several curves of cost, by replay.

    python bench/planning/ablations.py record TARGET --head HEAD --prompts FILE.jsonl ... --out ROUNDS.npz [--temperature T]
    python bench/planning/ablations.py table FITTED.npz ROUNDS.npz --costs COSTS.json

`record` decodes every prompt with all drafted tokens verified and keeps confidence logits, margins and what was accepted.
`table` fits each source on the rounds of FITTED and replays the rounds of ROUNDS, one request at a time: what it prints are replays
with the costs given, no measurements. COSTS.json holds this machine's planning costs as `dspark profile --json` prints them
under `planning`; beside them a smooth curve and a stair are made up, both in units of one plain step.

Sources: raw; temperatures (the paper's STS); bias (a logistic curve of the logit); margin (of the logit and the margin of the two best
draft logits); margin alone; oracle (1 where the token stood, 0 where not: no plan may know it, it is the bound)."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dspark.core.planner import Costs, CostTable
from dspark.measure.calibrate import Settings, record
from dspark.measure.calibration import Rounds, figures, fit_curves, fit_temperatures, margin_survival, sigmoid, survival
from dspark.measure.replay import replay
from dspark.measure.trace import Drafted, Request, Trace
from dspark.prompts import read_json, read_prompts

PLANS = ("fixed", "length:3", "threshold:0.2", "threshold:0.4", "early-stop", "lagged", "auto")
SMOOTH = Costs(0.3, tuple(1 + 0.1 * k for k in range(16)))
STAIR = Costs(0.3, tuple(1 + 0.4 * (k // 4 + (k > 0)) for k in range(16)))  # rows in fours: what many kernels pad to
"""  # noqa: ERA001 """
