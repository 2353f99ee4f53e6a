"""dspark: plainly (`none`), with a head and prompt lookup in turns (`head`), the head alone (`head-alone`), or prompt lookup (`lookup`)."""

import argparse

import torch
from serve import Answer, serve, timed

import dspark
from dspark.generation import make_drafter, make_law, make_planner, stream
from dspark.head.folder import find_head, load_head
from dspark.target.demo import NAME

DTYPE = {"bf16": "bfloat16", "f32": "float32", "int8": "int8"}


def load(options: argparse.Namespace) -> tuple[Answer, dict]:
    torch.set_num_threads(options.threads)
    target = dspark.load_target(NAME, dtype=DTYPE[options.precision])
    head = load_head(find_head(options.head or None, NAME), target) if options.method.startswith("head") else None
    drafter = make_drafter({"lookup": "lookup", "head-alone": "dspark"}.get(options.method), target, head)
    plan = make_planner(None, target, drafter)  # learns from prompt to prompt, as in `dspark generate`

    def answer(ids: list[int], n: int) -> dict:
        done = []

        def rounds():
            for one in stream(target, head, ids, max_new_tokens=n, law=make_law(), drafter=drafter, plan=plan):
                done.append(one)
                yield one.tokens

        return timed(rounds()) | {"drafted": sum(r.num_planned for r in done), "accepted": sum(r.num_accepted for r in done)}

    return answer, {"version": dspark.__version__, "torch": torch.__version__, "runtime": target.runtime_name}


serve(load)
