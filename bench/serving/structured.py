"""Is every structured answer valid? Prompts with JSON schemas through the openai client, greedy and sampled, streamed or whole.

    python bench/serving/structured.py --url http://127.0.0.1:8101/v1 --prompts FILE.jsonl --json OUT.json

Each prompt gets the schema that its text asks for, else one of a list in turn. An answer counts if it ended by itself and
jsonschema_rs finds it valid. Exits 1 unless all do."""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import jsonschema_rs
import openai

from dspark.prompts import read_prompts

WORD = {"type": "string", "maxLength": 24}
COUNT = {"type": "integer", "minimum": 0, "maximum": 999}
PRICE = {"type": "number", "minimum": 0, "maximum": 9999}


def thing(**properties) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def few(items: dict, most: int = 4) -> dict:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": most}


ORDER = few(thing(item=WORD, quantity=COUNT, price=PRICE))
SCHEMAS = [
    thing(name=WORD, age=COUNT, married={"type": "boolean"}),
    thing(title=WORD, tags=few(WORD, 3), rating={"enum": ["good", "fair", "poor"]}),
    thing(when={"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"}, place=thing(town=WORD, country=WORD)),
    {"anyOf": [thing(ok={"const": True}, value=COUNT), thing(ok={"const": False}, reason=WORD)]},
    thing(rows=few(few({"type": "integer", "minimum": -9, "maximum": 9}, 3), 3)),
    thing(code={"type": "string", "maxLength": 80}, language={"enum": ["python", "c", "sql"]}, note={"type": ["string", "null"], "maxLength": 20}),
    thing(function={"enum": ["get_weather", "send_mail", "search"]}, arguments=thing(query=WORD, limit=COUNT)),
]  # fmt: skip


def schema_for(text: str, number: int) -> dict:
    return ORDER if "quantity" in text and "price" in text else SCHEMAS[number % len(SCHEMAS)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--prompts", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument("--max-tokens", type=int, default=600)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    client = openai.OpenAI(base_url=options.url, api_key="none", timeout=600)
    model = client.models.list().data[0].id
    counts: Counter[tuple[float, bool, str]] = Counter()
    faults, tokens, rounds = [], Counter(), Counter()
    began = time.perf_counter()
    greedy: dict[int, str] = {}
    for number, prompt in enumerate(read_prompts(options.prompts)):
        text = prompt.content if isinstance(prompt.content, str) else prompt.content[-1]["content"]
        schema = schema_for(text, number)
        asked = {
            "model": model, "messages": [{"role": "user", "content": text}], "max_tokens": options.max_tokens,
            "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
        }  # fmt: skip
        for temperature in (0.0, 1.0):
            for streamed in (False, True):
                if streamed:
                    answer, reason, usage = "", None, None
                    chunks = client.chat.completions.create(
                        **asked, temperature=temperature, stream=True, stream_options={"include_usage": True}
                    )
                    for chunk in chunks:
                        usage = chunk.usage or usage
                        for choice in chunk.choices:
                            answer += choice.delta.content or ""
                            reason = choice.finish_reason or reason
                else:
                    whole = client.chat.completions.create(**asked, temperature=temperature)
                    answer, reason, usage = whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage
                tokens[temperature] += usage.completion_tokens
                rounds[temperature] += usage.dspark["rounds"]
                try:
                    jsonschema_rs.validate(schema, json.loads(answer))
                    verdict = "valid" if reason == "stop" else "cut"
                except (ValueError, jsonschema_rs.ValidationError) as error:
                    verdict = "invalid" if reason == "stop" else "cut"
                    faults.append([number, temperature, streamed, reason, answer, str(error).splitlines()[0]])
                counts[temperature, streamed, verdict] += 1
                if temperature == 0 and answer != greedy.setdefault(number, answer):
                    faults.append([number, temperature, streamed, "streamed and whole differ", answer, greedy[number]])
    for (temperature, streamed, verdict), count in sorted(counts.items()):
        print(f"T = {temperature:g}, {'streamed' if streamed else 'whole'}: {count} {verdict}")
    for temperature in tokens:
        print(f"T = {temperature:g}: {tokens[temperature] / rounds[temperature]:.2f} tokens a round")
    print(f"{time.perf_counter() - began:.0f} s; {len(faults)} faults", *faults[:10], sep="\n  ")
    if options.json:
        table = [[*key, count] for key, count in sorted(counts.items())]
        options.json.write_text(json.dumps({"counts": table, "faults": faults}, indent=1) + "\n")
    return 1 if faults or any(verdict != "valid" for *_, verdict in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
