"""`dspark inspect HEAD`"""

import argparse
import json
import re
import shlex
from dataclasses import asdict

from dspark.cli.options import say_unfinished
from dspark.errors import HeadError
from dspark.prompts import read_json

FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)  # what the hub reads at the top of a card


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("head", metavar="HEAD", help="folder, hub id, or the name of a shipped head")
    parser.add_argument("--json", action="store_true", help="configuration and provenance as JSON")


def run(options: argparse.Namespace) -> int:
    from dspark.head.calibration import read_calibration, summary
    from dspark.head.folder import golden_file, named_head, read_any_config, read_tensors
    from dspark.head.golden import told_by

    folder = named_head(options.head)
    config, section = read_any_config(folder)
    say_unfinished(folder)
    calibration = read_calibration(folder, config.block_size)
    golden = golden_file(folder)
    drafted = told_by(read_tensors(golden)) if golden.exists() else None
    hint = "restore the file; the head itself works without it"
    if options.json:
        record = folder / "provenance.json"
        provenance = read_json(record, HeadError, hint) if record.exists() else None
        print(json.dumps({"folder": str(folder), "config": config.__dict__, "dspark": section, "provenance": provenance,
                          "calibration": calibration and asdict(calibration),
                          "golden": drafted and {"accepted": drafted[0], "tokens": drafted[1]}}))  # fmt: skip
        return 0
    card = folder / "README.md"
    text = f"{folder}: no card; target {section.get('target')}, block size {config.block_size}"
    try:
        shown = FRONT_MATTER.sub("", card.read_text(encoding="utf-8")) if card.exists() else text
        print(shown.replace("--head DIR", f"--head {shlex.quote(options.head)}"))  # a card does not know where its head lies
        if drafted is not None:
            print("golden text: draft accepted {} of {} tokens when the head was saved".format(*drafted))
        if calibration is not None:
            print(f"calibration.json, fitted with {calibration.precision} weights:\n{summary(calibration)}")
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise HeadError(f"cannot read {card}: {error}", hint) from error
    return 0
