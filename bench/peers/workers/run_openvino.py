"""OpenVINO GenAI: `LLMPipeline` on a GGUF file, plainly or with prompt lookup."""

import argparse

import numpy as np
import openvino as ov
import openvino_genai as genai
from serve import Answer, serve

LOOKUP = {"num_assistant_tokens": 5, "max_ngram_size": 3}  # of its own prompt lookup example


def load(options: argparse.Namespace) -> tuple[Answer, dict]:
    more = LOOKUP if options.method == "lookup" else {}
    pipeline = genai.LLMPipeline(options.model, "CPU", INFERENCE_NUM_THREADS=options.threads, **({"prompt_lookup": True} if more else {}))

    def answer(ids: list[int], n: int) -> dict:
        config = genai.GenerationConfig(do_sample=False, max_new_tokens=n, eos_token_id=options.eos, **more)
        result = pipeline.generate(ov.Tensor(np.array([ids])), config)
        tokens = list(result.tokens[0])
        if result.finish_reasons[0] == genai.GenerationFinishReason.STOP and tokens[-1:] != [options.eos]:
            tokens.append(options.eos)
        metrics = result.perf_metrics
        prompt_s, total_s = metrics.get_ttft().mean / 1e3, metrics.get_generate_duration().mean / 1e3
        first = metrics.raw_metrics.m_batch_sizes[0]
        return {"tokens": tokens, "first": first, "prompt_s": prompt_s, "decode_s": total_s - prompt_s, "drafted": None, "accepted": None}

    precision = ov.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
    return answer, {"version": genai.__version__, "inference_precision": precision, **more}


serve(load)
