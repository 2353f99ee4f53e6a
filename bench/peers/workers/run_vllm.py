"""vLLM on its CPU back end: the engine in this process, plainly or with n-gram speculation."""

import argparse
import os

from serve import Answer, serve, timed

# Read by vLLM when it is imported. This build fails to load what it compiled ahead of time and would compile at every start.
os.environ |= {
    "VLLM_USE_AOT_COMPILE": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip

# Told the longest n-gram only, it looks for no shorter ones; dspark's own prompt lookup takes 2 to 4 tokens too.
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
COUNTERS = {"drafted": "vllm:spec_decode_num_draft_tokens", "accepted": "vllm:spec_decode_num_accepted_tokens"}


def load(options: argparse.Namespace) -> tuple[Answer, dict]:
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "VLLM_CACHE_ROOT": f"{options.home}/vllm/cache"}
    import vllm

    more = {"speculative_config": NGRAM} if options.method == "ngram" else {}
    engine = vllm.LLM(
        options.model, dtype="bfloat16", max_model_len=options.context, max_num_seqs=1,
        enable_prefix_caching=False, disable_log_stats=False, **more,
    )  # fmt: skip
    number = iter(range(1 << 62))

    def counts() -> dict[str, int | None]:
        values = {metric.name: metric.value for metric in engine.get_metrics() if metric.name in COUNTERS.values()}
        return {key: values.get(name) for key, name in COUNTERS.items()}

    def rounds(ids: list[int], n: int):
        core, told = engine.llm_engine, 0
        sampling = vllm.SamplingParams(temperature=0, max_tokens=n, stop_token_ids=[options.eos], detokenize=False)
        core.add_request(str(next(number)), {"prompt_token_ids": ids}, sampling)
        while core.has_unfinished_requests():
            for output in core.step():
                tokens = list(output.outputs[0].token_ids)
                yield tokens[told:]
                told = len(tokens)

    def answer(ids: list[int], n: int) -> dict:
        before = counts()
        reply = timed(rounds(ids, n))
        return reply | {key: None if now is None else now - before[key] for key, now in counts().items()}

    return answer, {"version": vllm.__version__, **more}


serve(load)
